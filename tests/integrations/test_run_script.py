"""`python -m torch_reprise run` on a training script with Transformers that knows nothing of us.

The script is `examples/transformers_train.py`. Each run is a process of its own, which leaves the
losses and gradients of every step behind; those are compared by their bits.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, freeze

SCRIPT = Path(__file__).parents[2] / "examples" / "transformers_train.py"
STEPS, ACCUMULATE, LAYERS = 3, 2, 4
SEGMENTS = STEPS * ACCUMULATE * LAYERS
OPTIONS = [
    *("--max_steps", str(STEPS), "--gradient_accumulation_steps", str(ACCUMULATE)),
    *("--per_device_train_batch_size", "4", "--learning_rate", "1e-3"),
    *("--use_cpu", "True", "--dataloader_pin_memory", "False", "--disable_tqdm", "True"),
    *("--report_to", "none", "--save_strategy", "no"),
]


def run_script(launcher: Sequence[object], folder: Path, *options: str) -> tuple[Any, str]:
    """Runs it with the same Python; gives what it left in `folder`, and its stderr."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *map(str, launcher), SCRIPT, "--output_dir", folder, *OPTIONS, *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = torch.load(folder / "steps.pt")
    assert len(steps["losses"]) == len(steps["gradients"]) == STEPS
    return steps, done.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The script as it is, without checkpointing and without us."""
    return run_script([], tmp_path_factory.mktemp("script") / "plain")[0]


def test_the_script_does_not_know_us() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    code = text.split('"""', 2)[2]
    assert "reprise" not in code and "checkpoint" not in code


CHECKPOINTED = ["--activation_checkpointing", "True", "--activation_checkpointing_kwargs"]


def run_with_report(report: Path, use_reentrant: str) -> Any:
    steps, closing = run_script(
        ["-m", "torch_reprise", "run", "--report", report],
        report.parent / "run",
        *CHECKPOINTED,
        f'{{"use_reentrant": {use_reentrant}}}',
    )
    assert f"torch_reprise: {SEGMENTS} segments, {SEGMENTS} replays" in closing
    return steps


def test_the_script_is_exact_and_its_replays_are_in_the_report(plain: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.csv"
    assert_same_bits(freeze(run_with_report(report, "false")), freeze(plain))
    with report.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == SEGMENTS
    for row in rows:
        assert row["name"] == "GPT2Block.forward"
        assert row["reentrant"] == "False"
        assert row["replays"] == "1"


def test_the_reentrant_form_is_exact_and_on_the_page(plain: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert_same_bits(freeze(run_with_report(page, "true")), freeze(plain))
    assert page.read_text(encoding="utf-8").count("GPT2Block.forward") >= 1
