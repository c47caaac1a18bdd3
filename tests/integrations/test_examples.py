"""Every example as a program: its table says that our run is exact, and that it replayed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# The options to run it with, the replays of our run, and what torch's own run says of the buffers.
TABLES = {
    "transformers_llama.py": ([], 24, "equal"),
    "peft_lora.py": (["--reentrant"], 24, "equal"),
    "accelerate_loop.py": ([], 48, "equal"),
    "lightning_fit.py": (["--reentrant"], 24, "differ"),
    "timm_images.py": (["resnet"], 24, "differ"),
    "torchtitan_style.py": (["selective"], 24, "equal"),
}
# Not run for a table: test_trainer.py runs it as a script that knows nothing of us.
OTHERS = {"comparison.py", "transformers_train.py"}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*TABLES, *OTHERS}


def run(*command: object) -> tuple[int, dict[str, list[str]], str]:
    """The exit status, the table's rows by their first column, and all that was printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    return done.returncode, rows, done.stdout + done.stderr


@pytest.mark.parametrize("name", TABLES)
def test_an_example_is_exact(name: str) -> None:
    options, replays, torchs_buffers = TABLES[name]
    status, rows, printed = run(name, *options)
    assert status == 0, printed
    assert rows["plain"][:4] == ["reference", "reference", "reference", "0"]
    assert rows["torch"][:4] == ["equal", "equal", torchs_buffers, "0"]
    assert rows["torch_reprise"][:4] == ["equal", "equal", "equal", str(replays)]


NOT_EXACT = """
import torch
from comparison import Watch, compare

model = torch.nn.Linear(2, 2)

def train(checkpointing):
    watch = Watch(model)
    for _ in range(2):
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        watch.step(loss)
        {after}
    return watch

raise SystemExit(compare(train))
"""


@pytest.mark.parametrize(
    ("after", "row"),
    [
        ("pass", ["equal", "differ", "equal", "0"]),  # the next run adds to its gradients
        ("model.zero_grad()", ["equal", "equal", "equal", "0"]),  # nothing is replayed
    ],
)
def test_a_run_that_is_not_exact_is_an_error(after: str, row: list[str]) -> None:
    status, rows, printed = run("-c", NOT_EXACT.format(after=after))
    assert status == 1, printed
    assert rows["torch_reprise"][:4] == row
