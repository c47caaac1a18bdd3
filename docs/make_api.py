"""Writes docs/api.md from the docstrings of the public names.

python docs/make_api.py           writes it
python docs/make_api.py --check   fails if it is not what the docstrings say
"""

from __future__ import annotations

import inspect
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


def _signature(name: str, thing: Any) -> str:
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return name
    words: list[str] = []
    for parameter in inspect.signature(thing).parameters.values():
        default = parameter.default
        if parameter.kind is parameter.KEYWORD_ONLY and not any(w[0] == "*" for w in words):
            words.append("*")
        if default is not parameter.empty and hasattr(default, "__name__"):
            words.append(f"{parameter.name}={default.__name__}")  # its repr has an address
        else:
            words.append(str(parameter.replace(annotation=parameter.empty)))
    return f"{name}({', '.join(words)})"


def _fields(thing: Any) -> str:
    names = getattr(thing, "_fields", ())
    return f"\n\nFields: {', '.join(f'`{name}`' for name in names)}." if names else ""


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
            lines += ["", f"### `{_signature(name, thing)}`", "", "```text", doc, "```"]
            extra = _fields(thing)
            if extra:
                lines.append(extra)
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
