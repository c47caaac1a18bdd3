"""Writes docs/api.md, in Markdown, from the docstrings of the public names.

python docs/make_api.py           writes it
python docs/make_api.py --check   fails if it is not what the docstrings say
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch_reprise
from torch_reprise import ledger, rng

TARGET = Path(__file__).resolve().parent / "api.md"

SECTIONS: dict[str, tuple[Any, list[str]]] = {
    "Checkpointing": (
        torch_reprise,
        ["checkpoint", "checkpoint_sequential", "Checkpointer", "CheckpointFunction"],
    ),
    "Controls": (
        torch_reprise,
        [
            "set_checkpoint_early_stop",
            "is_recomputing",
            "set_checkpoint_debug_enabled",
            "GraphExecGroup",
            "noop_context_fn",
        ],
    ),
    "In the place of torch's": (
        torch_reprise,
        ["install", "uninstall", "installed", "is_installed"],
    ),
    "Errors": (torch_reprise, ["CheckpointError"]),
    "Helpers": (torch_reprise, ["detach_variable", "check_backward_validity"]),
    "Random state: `torch_reprise.rng`": (
        rng,
        [name for name in rng.__all__ if name != "DefaultDeviceType"],
    ),
    "The ledger: `torch_reprise.ledger`": (ledger, list(ledger.__all__)),
}

FROM_TORCH = [
    "CheckpointPolicy",
    "DefaultDeviceType",
    "SAC_IGNORED_OPS",
    "SelectiveCheckpointContext",
    "create_selective_checkpoint_contexts",
]

_HEADINGS = {name for _, names in SECTIONS.values() for name in names}
_SECTIONS = {"Args:": "Arguments", "Returns:": "Returns", "Raises:": "Raises"}
_WIDTH = 88  # of a signature on one line


def _signature(name: str, thing: Any) -> str:
    """As it would be called, on one line or on one for each parameter."""
    words: list[str] = []
    for parameter in inspect.signature(thing).parameters.values():
        default = parameter.default
        if parameter.kind is parameter.KEYWORD_ONLY and not any(w[0] == "*" for w in words):
            words.append("*")
        if default is not parameter.empty and hasattr(default, "__name__"):
            words.append(f"{parameter.name}={default.__name__}")  # its repr has an address
        else:
            words.append(str(parameter.replace(annotation=parameter.empty)).replace("'", '"'))
    line = f"{name}({', '.join(words)})"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), ")"])


def _fields(thing: Any) -> str:
    names = getattr(thing, "_fields", ())
    return f"Fields: {', '.join(f'`{name}`' for name in names)}." if names else ""


def _members(thing: Any) -> list[str]:
    """The methods and properties of a class that say what they are for, as a list."""
    if not isinstance(thing, type) or issubclass(thing, BaseException):
        return []
    result = []
    for name, member in vars(thing).items():
        what = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        doc = inspect.getdoc(what)
        if (
            name[0] == "_"
            or not doc
            or not (inspect.isfunction(what) or isinstance(what, property))
        ):
            continue
        call = name
        if inspect.isfunction(what):
            hidden = 0 if isinstance(member, staticmethod) else 1  # self or cls
            parameters = list(inspect.signature(what).parameters.values())[hidden:]
            words = [str(each.replace(annotation=each.empty)) for each in parameters]
            call = f"{name}({', '.join(words)})"
        result.append(f"- `{call}`: {_inline(' '.join(_blocks(doc.splitlines())[0]))}")
    return result


def _inline(text: str) -> str:
    """Marks within a line: code, and names that have a heading on the page."""

    def reference(found: re.Match[str]) -> str:
        name = found[1]
        return f"[`{name}`](#{name.lower()})" if name in _HEADINGS else f"`{name}`"

    text = re.sub(r":(?:func|class|data):`([^`]+)`", reference, text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    # In a docstring a space parts the closing mark from the letter of a plural.
    return re.sub(r"((?:`|`\]\(#\w+\))) s\b", r"\1s", text)


def _blocks(lines: list[str]) -> list[list[str]]:
    """Lines between empty ones."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def _entries(lines: list[str]) -> list[str]:
    """``name: text`` with further lines indented, as a list."""
    found: list[str] = []
    for line in lines:
        if line[0] != " ":
            names, colon, text = line.partition(": ")
            # The names may go on in the next line.
            if found and found[-1].endswith(","):
                found[-1] += " " + line
            else:
                found.append(names + colon + text)
        else:
            found[-1] += " " + line.strip()
    result = []
    for entry in found:
        names, colon, text = entry.partition(": ")
        if not colon:
            raise SystemExit(f"no 'name: text' in a docstring: {entry!r}")
        marked = ", ".join(f"`{name.strip()}`" for name in names.split(","))
        result.append(f"- {marked}: {_inline(text)}")
    return result


def _markdown(doc: str) -> list[str]:
    """A docstring in Markdown: paragraphs, lists, code; sections of arguments and errors."""
    result: list[str] = []
    code = False  # does the next block, if it is indented, hold code
    section: list[str] = []
    title = ""

    def end_section() -> None:
        nonlocal title, section
        if not title:
            return
        lines = inspect.cleandoc("\n".join(["", *section])).split("\n")
        result.extend([f"**{title}**", ""])
        if title == "Returns":
            result.append(_inline(" ".join(lines)))
        else:
            result.extend(_entries(lines))
        result.append("")
        title, section = "", []

    for block in _blocks(doc.split("\n")):
        if block[0] in _SECTIONS:
            end_section()
            title, section = _SECTIONS[block[0]], block[1:]
        elif title and block[0][0] == " ":
            section.extend(block)
        elif code and block[0][0] == " ":
            lines = inspect.cleandoc("\n".join(["", *block])).split("\n")
            if result[-2:] == ["```", ""]:  # it went on after an empty line
                result[-2:] = ["", *lines, "```", ""]
            else:
                result.extend(["```py", *lines, "```", ""])
        elif block[0].startswith("* "):
            end_section()
            items: list[str] = []
            for line in block:
                if line.startswith("* "):
                    items.append("- " + line[2:])
                else:
                    items[-1] += " " + line.strip()
            result.extend([*(_inline(item) for item in items), ""])
        else:
            end_section()
            text = " ".join(line.strip() for line in block)
            code = text.endswith("::")
            result.extend([_inline(text[:-1] if code else text), ""])
    end_section()
    return result[:-1]


def render() -> str:
    lines = [
        "# API",
        "",
        "Written from the docstrings by `docs/make_api.py`. All names are in `torch_reprise` "
        "unless the heading says otherwise.",
    ]
    for title, (owner, names) in SECTIONS.items():
        lines += ["", f"## {title}"]
        module: ModuleType = owner
        if module is not torch_reprise:
            lines += ["", inspect.cleandoc(module.__doc__ or "").split("\n")[0]]
        for name in names:
            thing = getattr(module, name)
            doc = inspect.getdoc(thing)
            if not doc:
                raise SystemExit(f"{module.__name__}.{name} has no docstring")
            lines += ["", f"### {name}", ""]
            if not (isinstance(thing, type) and issubclass(thing, BaseException)):
                lines += ["```py", _signature(name, thing), "```", ""]
            lines += _markdown(doc)
            for extra in (_fields(thing), "\n".join(_members(thing))):
                if extra:
                    lines += ["", extra]
    lines += [
        "",
        "## torch's own, under our name",
        "",
        "The same objects as in `torch.utils.checkpoint`; they work with our `context_fn`: "
        + ", ".join(f"`{name}`" for name in FROM_TORCH)
        + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    documented = {name for _, names in SECTIONS.values() for name in names} | set(FROM_TORCH)
    missing = set(torch_reprise.__all__) - documented - {"ledger", "rng"}
    if missing:
        raise SystemExit(f"public names without a place in docs/api.md: {sorted(missing)}")
    text = render()
    if "--check" in sys.argv:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            print("docs/api.md is not what the docstrings say: run python docs/make_api.py")
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
