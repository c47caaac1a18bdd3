"""python -m torch_reprise run: an unmodified program, its arguments, its errors, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINING = """
import sys
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# mode: plain or checkpointed
mode, path = sys.argv[1:]
torch.manual_seed(0)
blocks = nn.ModuleList(
    nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Tanh())
    for _ in range(3)
)
optimizer = torch.optim.SGD(blocks.parameters(), lr=0.1)
seen = []
for step in range(4):
    x = torch.randn(8, 16)
    for block in blocks:
        x = block(x) if mode == "plain" else checkpoint(block, x, use_reentrant=False)
    loss = x.square().mean()
    loss.backward()
    seen += [loss.detach(), *(p.grad.clone() for p in blocks.parameters())]
    optimizer.step()
    optimizer.zero_grad()
seen += [*blocks.state_dict().values(), torch.get_rng_state()]
torch.save(seen, path)
print("done", step)
"""


def run(*arguments: str | Path, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=options.get("cwd"),
        env={**os.environ, "PYTHONWARNINGS": ""},
    )


RUN = ("-m", "torch_reprise", "run")


@pytest.fixture
def training(tmp_path: Path) -> Path:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    return script


def test_an_unmodified_program_is_exact_and_reported(training: Path, tmp_path: Path) -> None:
    import torch

    plain, ours = tmp_path / "plain.pt", tmp_path / "ours.pt"
    assert run(training, "plain", plain).returncode == 0
    report = tmp_path / "report.json"
    done = run(*RUN, "--report", report, training, "checkpointed", ours)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done 3\n"
    assert done.stderr.startswith("torch_reprise: 12 segments, 12 replays, "), done.stderr
    expected, found = torch.load(plain), torch.load(ours)
    assert len(expected) == len(found) > 20
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    names = [event["name"] for event in json.loads(report.read_text())["traceEvents"]]
    assert sum("replay" in name for name in names) >= 12


def test_the_report_holds_so_many_segments(training: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.csv"
    done = run(
        *RUN, "--report", report, "--segments", "5", training, "checkpointed", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert "12 segments" in done.stderr
    assert len(report.read_text().strip().splitlines()) == 1 + 5


SHOW = """
import sys, os
print(sys.argv, sys.path[0], __name__, __file__ if "__file__" in globals() else None)
"""


@pytest.mark.parametrize("first", [(), ("--",), ("--", "--"), ("sub/show.py", "--")])
def test_the_program_finds_what_python_would_give_it(
    first: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "show.py").write_text(SHOW)
    arguments = (*first, "--report", "x.html", "-m", "--", "--help")
    expected = run("sub/show.py", *arguments, cwd=str(tmp_path))
    found = run(*RUN, "--quiet", "sub/show.py", *arguments, cwd=str(tmp_path))
    assert expected.returncode == found.returncode == 0
    assert found.stdout == expected.stdout
    assert found.stderr == ""


def test_a_module_is_run_as_python_would(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "program.py").write_text(
        "import sys, package\nprint(sys.argv[1:], __name__, __package__, sys.path[0])\n"
    )
    expected = run("-m", "package.program", "a", "-b", cwd=str(tmp_path))
    found = run(*RUN, "--quiet", "-m", "package.program", "a", "-b", cwd=str(tmp_path))
    assert expected.returncode == found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout


@pytest.mark.parametrize(
    ("program", "status"),
    [("import sys; sys.exit(7)", 7), ("raise ValueError('mine')", 1), ("", 0)],
)
def test_how_the_program_ends_is_how_it_ends(tmp_path: Path, program: str, status: int) -> None:
    script = tmp_path / "ends.py"
    script.write_text(program)
    report = tmp_path / "report.txt"
    done = run(*RUN, "--report", report, script)
    assert done.returncode == status
    assert done.stderr.endswith("torch_reprise: the program checkpointed nothing.\n") or (
        "the program checkpointed nothing." in done.stderr and "ValueError: mine" in done.stderr
    )
    assert report.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "there is no file missing.py"),
        (["--report", "r.pdf", "x.py"], "goes by the suffix, one of .html"),
        (["--report", "nowhere/r.html", "x.py"], "there is no folder"),
        (["--segments", "0", "x.py"], "--segments must be at least 1, got 0"),
        ([], "required: program"),
    ],
)
def test_wrong_use_is_refused_before_anything_runs(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run(*RUN, *arguments, cwd=str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
