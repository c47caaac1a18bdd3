"""The demo: exact runs give exit status 0 and a picture, anything else gives 1 and a reason."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import torch_reprise
from torch_reprise._demo import data
from torch_reprise._demo.model import GPT, Block, GPTConfig
from torch_reprise._demo.run import (
    PLAIN,
    Implementations,
    Report,
    Settings,
    exactness_table,
    implementations,
    main,
    train,
)

pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
pytest.importorskip("rich", reason="the demo prints with rich")

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = "--steps 3 --layers 2 --width 16 --heads 2 --context 16 --batch 2".split()
SETTINGS = Settings(steps=3, batch=2, context=16, layers=2, width=16, heads=2, dropout=0.1, seed=0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As the demo itself: the operators are far too small to share. conftest puts it back."""
    torch.set_num_threads(1)


def other_dropout(block: nn.Module, hidden: Tensor) -> Tensor:
    """Replays with new random numbers, as a checkpoint does that keeps no random state."""
    result: Tensor = torch.utils.checkpoint.checkpoint(
        block, hidden, use_reentrant=False, preserve_rng_state=False
    )
    return result


def one_draw_more(block: nn.Module, hidden: Tensor) -> Tensor:
    """Exact but for one random number that nobody asked for."""
    result: Tensor = block(hidden)
    torch.rand(1)
    return result


def no_gradient(block: nn.Module, hidden: Tensor) -> Tensor:
    """Cuts the graph in front of every block."""
    result: Tensor = block(hidden.detach())
    return result


def last_bits(block: nn.Module, hidden: Tensor) -> Tensor:
    """Changes every number in its last bits; not all by one factor, which norms take out again."""
    result: Tensor = block(hidden)
    return result + result.detach().roll(1, dims=-1) * 2.0**-16


def compare(function: object) -> Report:
    functions: Implementations = {PLAIN: None, "other": function}  # type: ignore[dict-item]
    return train(SETTINGS, functions)


def test_the_demo_is_exact_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    assert main([*SMALL, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert printed.count("equal ") >= 4 * 3  # four verdicts for each of three runs
    assert "differs" not in printed
    assert "Exact: 3 checkpointed runs" in printed


def test_every_run_of_the_demo_is_there() -> None:
    functions = implementations()
    assert [name for name, function in functions.items() if function is None] == [PLAIN]
    used = [f.func for f in functions.values() if isinstance(f, partial)]
    assert used.count(torch.utils.checkpoint.checkpoint) == 1
    assert used.count(torch_reprise.checkpoint) == 2


def test_the_library_holds_less_for_backward() -> None:
    replays = torch_reprise.ledger.replays()
    report = compare(partial(torch_reprise.checkpoint, use_reentrant=False))
    assert torch_reprise.ledger.replays() > replays
    plain, other = (run.memory for run in report.runs)
    assert plain is not None and other is not None
    assert 0 < other.held < plain.held
    assert plain.held <= plain.peak
    # After the backward the gradients are left and the loss, in both runs the same bytes.
    gradients = sum(p.grad.nbytes for p in report.runs[0].model.parameters() if p.grad is not None)
    assert gradients <= plain.backward[-1] == other.backward[-1]


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        (other_dropout, {"gradients", "random_state"}, "gradients differ in"),
        (one_draw_more, {"losses", "random_state"}, "random state differs in 3 of 3 steps"),
        (no_gradient, {"gradients"}, "first in tokens.weight"),
        (last_bits, {"losses", "gradients", "parameters"}, "loss differs in"),
    ],
)
def test_what_is_not_exact_is_named(function: object, wrong: set[str], message: str) -> None:
    report = compare(function)
    verdict = report.verdicts["other"]
    assert not report.exact and not verdict.exact
    assert wrong <= {name for name, value in vars(verdict).items() if value is False}
    assert any(message in difference for difference in verdict.differences)
    assert "differs" in exactness_table(report).rows[1]


def test_an_inexact_run_makes_the_demo_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "demo.png"
    functions: Implementations = {**implementations(), "other dropout": other_dropout}
    assert main([*SMALL, "--out", str(picture)], functions) == 1
    assert picture.read_bytes().startswith(PNG)  # the picture shows what went wrong
    printed = capsys.readouterr().out
    assert "NOT EXACT" in printed
    assert "other dropout: gradients differ in" in printed
    assert "torch_reprise: " not in printed


@pytest.mark.parametrize(
    ("ours", "theirs", "equal"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), True),
        (torch.tensor(3.0), torch.tensor(3.0), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), False),
        (torch.tensor([1.0]), torch.tensor([1.0, 1.0]), False),
        (torch.tensor([1.0]), None, False),
        (None, None, False),
    ],
)
def test_equal_means_bits(ours: Tensor | None, theirs: Tensor | None, equal: bool) -> None:
    from torch_reprise._demo.run import _same

    assert _same(ours, theirs) is equal


def test_training_leaves_the_callers_random_state_alone() -> None:
    before = torch.get_rng_state()
    compare(partial(torch_reprise.checkpoint, use_reentrant=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_seed_gives_one_result() -> None:
    first, second = (compare(last_bits).reference.losses for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("count", [0, 2])
def test_one_reference_is_needed(count: int) -> None:
    functions: Implementations = {f"plain {i}": None for i in range(count)}
    with pytest.raises(ValueError, match=f"exactly one implementation must be None, got {count}"):
        train(SETTINGS, functions)


@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_a_missing_package_is_said_before_the_work(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    picture = tmp_path / "demo.png"
    assert main([*SMALL, "--out", str(picture)]) == 2
    assert f"pip install {package}" in capsys.readouterr().err
    assert not picture.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--width", "30", "--heads", "4"], "--width must be a multiple of --heads, got 30 and 4"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1, got 1.0"),
        (["--out", "/no/such/folder/demo.png"], "--out must lie in an existing folder"),
    ],
)
def test_bad_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err


def test_the_text_is_english_and_batches_shift_by_one() -> None:
    corpus = data.load()
    text = "".join(corpus.alphabet[i] for i in corpus.tokens.tolist())
    assert text.count(" the ") > 1000
    batches = corpus.batches(3, 2, 16, seed=1)
    again = corpus.batches(3, 2, 16, seed=1)
    other = corpus.batches(3, 2, 16, seed=2)
    assert len(batches) == 3
    for (inputs, targets), (same, _), (different, _) in zip(batches, again, other, strict=True):
        assert inputs.shape == targets.shape == (2, 16)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(inputs, same) and not torch.equal(inputs, different)


def test_a_python_without_help_topics_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match=r"module pydoc_data\.topics: use a complete CPython"):
        data.load()


def test_the_block_is_causal_and_drops_only_in_training() -> None:
    torch.manual_seed(0)
    block = Block(width=16, heads=2, dropout=0.5)
    hidden = torch.randn(1, 8, 16)
    assert not torch.equal(block(hidden), block(hidden))
    block.eval()
    assert torch.equal(block(hidden), block(hidden))
    later = hidden.clone()
    later[:, 5:] += 1.0
    assert torch.equal(block(hidden)[:, :5], block(later)[:, :5])
    assert not torch.equal(block(hidden)[:, 5:], block(later)[:, 5:])


def test_width_must_fit_the_heads() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of heads, got width 10, heads"):
        GPT(GPTConfig(layers=1, width=10, heads=4, context=8, vocabulary=5, dropout=0.0))
