"""The Markdown of the project as tests see it: blocks of code, links, headings.

Marks stand alone on a line right before a block, as comments that no reader of the page sees:

* ``<!-- not run: REASON -->``: the Python below is checked for its syntax only;
* ``<!-- output -->``: the text below is what the last block that ran printed, without the current
  folder in paths; ``...`` stands for anything;
* ``<!-- run -->``: the shell commands below are run.

Python whose first line is a comment with a file's name, ``# model.py``, is that file: it is
there for the blocks below, and messages have its lines.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
_OUTPUT = "output"
_RUN = "run"
_NOT_RUN = re.compile(r"not run: (\S.+)")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    mark: str  # the comment before it, or ""
    line: int  # of its first line of text
    text: str


class Page:
    """A file of Markdown, read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.blocks: list[Block] = []
        self.prose = ""  # the lines outside of blocks
        fence = mark = language = ""
        begin, lines = 0, list[str]()
        for number, line in enumerate(self.text.splitlines(), 1):
            opened = re.fullmatch(r"(`{3,})([^`]*)", line)
            if fence:
                if line == fence:
                    fence = ""
                    self.blocks.append(Block(language, mark, begin, "".join(lines)))
                    mark = ""
                else:
                    lines.append(line + "\n")
            elif opened:
                fence, language, begin = opened[1], opened[2].strip(), number + 1
                lines = []
            else:
                comment = re.fullmatch(r"<!-- (.+) -->", line)
                mark = comment[1] if comment else ""
                self.prose += line + "\n"
        if fence:
            raise ValueError(f"{self.name}: a block is not closed")

    def python(self) -> list[Block]:
        return [block for block in self.blocks if block.language == "python"]

    def links(self) -> list[str]:
        """Targets of ``[text](target)`` and of pictures, outside of code."""
        return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "``", self.prose))

    def addresses(self) -> list[str]:
        """Everything that looks like an address in the web, in code too."""
        return re.findall(r"https?:[^\s)>\]`\"']*", self.text)

    def anchors(self) -> set[str]:
        """What can stand behind ``#``: headings as repository hosts turn them into anchors."""
        found: set[str] = set()
        for heading in re.findall(r"^#{1,6} (.+)$", self.prose, re.MULTILINE):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            free, count = slug, 0
            while free in found:
                count += 1
                free = f"{slug}-{count}"
            found.add(free)
        return found


def ill_formed(address: str) -> str:
    """What is wrong with an address; empty if nothing is. Nobody is asked whether it answers."""
    if re.search(r"[.,;:]$", address):
        return "ends with a mark that belongs to the sentence"
    parts = urlsplit(address)
    if parts.scheme != "https":
        return "is not https"
    if not re.fullmatch(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}", parts.hostname or ""):
        return "has no host"
    if not re.fullmatch(r"[\w./~%+:@&=#?,-]*", address.removeprefix("https://")):
        return "has a character that does not belong into one"
    return ""


class Runner:
    """Runs the blocks of a page one after the other, in one namespace and the current folder."""

    def __init__(self, page: Page, names: dict[str, Any] | None = None) -> None:
        self.page = page
        # A module, for those who look up where a function is at home.
        self._module = ModuleType("documented")
        self.names: dict[str, Any] = self._module.__dict__
        self.names.update(names or {})
        self.ran = 0
        self._printed = ""

    def run(self) -> None:
        loaded = set(sys.modules)
        sys.modules[self._module.__name__] = self._module
        sys.path.insert(0, os.getcwd())  # for the files that the page makes
        try:
            self._run_blocks()
        finally:
            sys.path.remove(os.getcwd())
            del sys.modules[self._module.__name__]
            for module in set(sys.modules) - loaded:
                if Path(f"{module}.py").exists():
                    del sys.modules[module]

    def _run_blocks(self) -> None:
        for block in self.page.blocks:
            place = f"{self.page.name}, line {block.line}"
            if block.mark == _OUTPUT:
                self._compare(block, place)
            elif block.language == "python":
                self._python(block, place)
            elif block.mark == _RUN:
                self._shell(block)
            elif block.mark:
                raise AssertionError(f"{place}: a mark that nobody knows: {block.mark!r}")

    def _python(self, block: Block, place: str) -> None:
        file = re.match(r"# (\w+\.py)\n", block.text)
        code = compile(block.text, file[1] if file else place, "exec")
        if block.mark:
            assert _NOT_RUN.fullmatch(block.mark), f"{place}: {block.mark!r} gives no reason"
            return
        if file:
            Path(file[1]).write_text(block.text, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.names)
        self._printed = printed.getvalue()
        self.ran += 1

    def _shell(self, block: Block) -> None:
        self._printed = ""
        for line in block.text.splitlines():
            words = line.split()
            assert words[0] == "python", line
            run = subprocess.run(
                [sys.executable, *words[1:]],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                env={**os.environ, "PYTHONWARNINGS": "error"},
            )
            assert run.returncode == 0, run.stdout
            self._printed += run.stdout
        self.ran += 1

    def _compare(self, block: Block, place: str) -> None:
        wanted = "".join(line.rstrip() + "\n" for line in block.text.splitlines())
        printed = self._printed.replace(os.path.join(os.getcwd(), ""), "")
        found = "".join(line.rstrip() + "\n" for line in printed.splitlines())
        same = doctest.OutputChecker().check_output(wanted, found, doctest.ELLIPSIS)
        assert same, f"{place}: the page says\n{wanted}\nand what ran before it printed\n{found}"
