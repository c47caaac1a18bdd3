"""The documents say what the package does: the reference is current, the code runs, links lead
somewhere.

What Sphinx checks when it builds the site (``make docs``) is not repeated here.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from doc_pages import ROOT, Block, Page, Runner, ill_formed

import torch_reprise
from torch_reprise import ledger

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *DOCS,
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("*/*/README.md")),
]
WITH_PYTHON = [path for path in DOCS if Page(path).python()]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_reference_is_what_the_docstrings_say() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_api.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block.text for block in Page(ROOT / "README.md").python()]
    assert len(blocks) >= 2

    def block(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * mask

    x = torch.randn(4, requires_grad=True)
    names = {"block": block, "x": x, "mask": torch.ones(4), "model": torch.nn.Tanh()}
    before = ledger.segments()
    try:
        for code in blocks:
            exec(compile(code, "README.md", "exec"), names)
    finally:
        torch_reprise.uninstall()
    names["y"].sum().backward()
    assert ledger.segments() == before + 1
    found, x.grad = x.grad, None
    (torch.tanh(x) * torch.ones(4)).sum().backward()
    torch.tanh(x).sum().backward()
    assert found is not None and x.grad is not None and torch.equal(found, x.grad)
    del names["y"]


# A process group of gloo stays behind in caches of DTensor's. In a child that this process forks
# later, Python drops them, and torch joins threads that are not there: a segmentation fault.
IN_A_PROCESS_OF_ITS_OWN = {"docs/distributed.md"}


def run_apart(path: Path) -> None:
    program = (
        "from pathlib import Path; from doc_pages import Page, Runner\n"
        f"runner = Runner(Page(Path({str(path)!r})), {{}}); runner.run(); assert runner.ran > 0"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def clean_process() -> Iterator[None]:
    """What a page changes for the process is over with it."""
    yield
    torch_reprise.uninstall()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


# What the names stand for that a page takes as given.
def _given(page: str) -> dict[str, Any]:
    if page != "docs/trainers.md":
        return {}
    linear = torch.nn.Linear(4, 4)

    class Output:
        def __init__(self, x: torch.Tensor) -> None:
            self.loss = torch_checkpoint.checkpoint(linear, x, use_reentrant=False).sum()

    return {
        "model": Output,
        "batch": {"x": torch.randn(2, 4)},
        "blocks": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)),
    }


# The functions of a page hold its names, and these hold graphs.
@pytest.mark.needs_gc
# What Dynamo warns of when it looks at anything.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("path", WITH_PYTHON, ids=name)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    monkeypatch.chdir(tmp_path)
    if name(path) in IN_A_PROCESS_OF_ITS_OWN:
        run_apart(path)
        return
    runner = Runner(Page(path), _given(name(path)))
    runner.run()
    assert runner.ran > 0


def page_of(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.setattr("doc_pages.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    return Page(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\n1 +\n```\n", "invalid syntax"),
        ("<!-- not run: a GPU -->\n```python\n1 +\n```\n", "invalid syntax"),
        ("<!-- not run:  -->\n```python\n1\n```\n", "gives no reason"),
        ("<!-- skip -->\n```python\n1\n```\n", "gives no reason"),
        ("<!-- skip -->\n```text\n1\n```\n", "a mark that nobody knows"),
        ("```python\nprint(1)\n```\n\n<!-- output -->\n```text\n2\n```\n", "the page says\n2"),
        ("```python\nassert False, 'mine'\n```\n", "mine"),
        ("```python\nx = 1\n```\n```python\nassert x == 2, f'{x=}'\n```\n", "x=1"),
        ("<!-- run -->\n```sh\npython -c int('a')\n```\n", "invalid literal"),
        ("```python\n1\n", "is not closed"),
    ],
)
def test_a_page_that_is_wrong_is_found_out(
    text: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((SyntaxError, AssertionError, ValueError), match=re.escape(complaint)):
        Runner(page_of(tmp_path, text, monkeypatch)).run()


def test_marks_do_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "<!-- not run: a GPU is needed -->\n```python\nraise KeyError\n```\n"
        "```python\n# a.py\nprint(1)\nprint('two', 3)\n```\n"
        "<!-- output -->\n```text\n1\ntwo ...\n```\n"
        "<!-- run -->\n```sh\npython a.py\n```\n"
        "<!-- output -->\n```text\n1\ntwo 3\n```\n"
    )
    runner = Runner(page_of(tmp_path, text, monkeypatch))
    runner.run()
    assert runner.ran == 2


def test_most_code_runs() -> None:
    blocks = [block for path in DOCS for block in Page(path).python()]
    not_run = [block for block in blocks if block.mark.startswith("not run")]
    assert len(not_run) * 4 < len(blocks), [block.mark for block in not_run]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    page = Page(path)
    for link in page.links():
        if re.match(r"\w+:", link):
            assert link.startswith("https:"), link
            continue
        file, _, anchor = link.partition("#")
        assert not file.startswith("/"), f"{page.name} links to {link}, an absolute path"
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT) and target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in Page(target).anchors(), f"{page.name} links to {link}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_addresses_are_well_formed(path: Path) -> None:
    page = Page(path)
    wrong = {address: ill_formed(address) for address in page.addresses() if ill_formed(address)}
    assert not wrong


def test_what_is_looked_at_has_links_and_addresses() -> None:
    pages = [Page(path) for path in PAGES]
    assert sum(len(page.links()) for page in pages) >= 30
    assert sum(len(page.addresses()) for page in pages) >= 3
    assert any("#" in link for page in pages for link in page.links())


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org",
        "https:/example.org",
        "https://example",
        "https://example.org.",
        "https://example..org/a",
        "https://example.org/a|b",
    ],
)
def test_an_address_that_is_none_is_found_out(address: str) -> None:
    assert ill_formed(address)


def test_links_into_the_repository_lead_to_pages_of_the_site_or_name_the_file() -> None:
    on_site = runpy.run_path(str(ROOT / "docs" / "conf.py"))["links_to_pages"]
    text = "[a](../README.md#limits) [b](../csrc/host.h) [`x.py`](../examples/x.py) [c](rng.md)"
    assert on_site(text) == ("[a](readme.md#limits) b (`csrc/host.h`) `examples/x.py` [c](rng.md)")


def toctree_entries(block: Block) -> list[str]:
    assert block.language == "{toctree}"
    lines = [line.strip() for line in block.text.splitlines()]
    # "a page", or "a title <a page>"
    return [re.sub(r".*<(.+)>", r"\1", line) for line in lines if line and line[0] != ":"]


def test_every_page_is_in_the_navigation_once() -> None:
    index = Page(ROOT / "docs" / "index.md")
    trees = [block for block in index.blocks if block.language == "{toctree}"]
    found = sorted(entry for block in trees for entry in toctree_entries(block))
    assert found == sorted(path.stem for path in DOCS if path.stem != "index")


def arguments_of_torch() -> dict[str, set[str]]:
    """The public functions of torch.utils.checkpoint with their parameters' names."""
    tree = ast.parse(Path(torch_checkpoint.__file__).read_text(encoding="utf-8"))
    found: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in torch_checkpoint.__all__:
            found[node.name] = {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
    return found


def test_the_page_on_migrating_has_every_name_and_argument_of_torch() -> None:
    page = Page(ROOT / "docs" / "migrating.md")
    sections = re.split(r"^#{2,3} ", page.prose, flags=re.MULTILINE)
    arguments = arguments_of_torch()
    assert {"checkpoint", "checkpoint_sequential", "set_device_states"} <= set(arguments)
    for name in torch_checkpoint.__all__:
        assert re.search(rf"`{name}[`(]", page.prose), f"{name} is missing"
    for name in ("checkpoint", "checkpoint_sequential"):
        section = next(text for text in sections if text.startswith(f"`{name}`"))
        for argument in (*arguments[name], "preserve_rng_state"):
            assert f"| `{argument}`" in section, f"{name}: {argument} is missing"
    for name, wanted in arguments.items():
        if name not in ("checkpoint", "checkpoint_sequential"):
            row = re.search(rf"^\| `{name}[`(].*$", page.prose, re.MULTILINE)
            assert row is not None, f"{name} has no row"
            missing = wanted - set(re.findall(r"\w+", row[0]))
            assert not missing, f"{name}: {missing} missing"
