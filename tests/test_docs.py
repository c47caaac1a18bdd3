"""The documents say what the package does: the reference is current, the README's code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from torch_reprise import ledger

ROOT = Path(__file__).resolve().parent.parent


def test_the_reference_is_what_the_docstrings_say() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_api.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_code_in_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2

    def block(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * mask

    x = torch.randn(4, requires_grad=True)
    names = {"block": block, "x": x, "mask": torch.ones(4), "model": torch.nn.Tanh()}
    before = ledger.segments()
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    names["y"].sum().backward()
    assert ledger.segments() == before + 1
    found, x.grad = x.grad, None
    (torch.tanh(x) * torch.ones(4)).sum().backward()
    torch.tanh(x).sum().backward()
    assert found is not None and x.grad is not None and torch.equal(found, x.grad)
    del names["y"]


def test_links_between_the_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) >= 4
    for page, target in links:
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
