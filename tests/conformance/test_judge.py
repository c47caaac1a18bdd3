"""Each verdict can be had: implementations that do one thing wrong are judged for it."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

from conformance import page
from conformance.implementations import Implementation, LikeTorch, Run, Unsupported, find
from conformance.judge import SuiteError, difference, freeze, judge, one_line, play_here
from conformance.page import Column, Result
from conformance.registry import Case, ClearError, Outcome, Raised, Verdict

RUN = Path(__file__).with_name("run.py")


def program(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        return (x * torch.rand_like(x)).sin()

    x = torch.randn(4, requires_grad=True)
    out = use.checkpoint(fn, x)
    out.sum().backward()
    return out, x.grad


SIMPLE = Case("R1", "simple", program=program, error=ClearError(("KeyError",), "generator"))


class Wrong(Implementation):
    """Checkpoints as torch does, in the way that `run` says."""

    plain = False
    title = "wrong"

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def configured(self, **options: Any) -> Run:
        return self._run


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)


def raising(error: Exception) -> Run:
    def run(function: Any, *args: Any) -> Any:
        raise error

    return run


def other_output(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args) * (1 + 2**-20)


def other_numbers(function: Callable[..., Any], *args: Any) -> Any:
    return torch_checkpoint.checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False
    )


def draws_by_itself(function: Callable[..., Any], *args: Any) -> Any:
    torch.rand(1)
    return checkpoint(function, *args)


def leaves_a_draw(function: Callable[..., Any], *args: Any) -> Any:
    out = checkpoint(function, *args)
    random.random()
    return out


def ran_three_times(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        function(*args)
    return checkpoint(function, *args)


@pytest.mark.parametrize(
    ("run", "verdict", "detail"),
    [
        (checkpoint, Verdict.EXACT, ""),
        (other_output, Verdict.SILENT, "result[0]: other bits"),
        (other_numbers, Verdict.SILENT, "result[1]: other bits"),
        (draws_by_itself, Verdict.SILENT, "result[0]: other bits"),
        (leaves_a_draw, Verdict.SILENT, "Python's random: other bits"),
        (lambda f, *args: f(*args), Verdict.NO_REPLAY, "ran once"),
        (raising(KeyError("generator cpu")), Verdict.CLEAR, "generator cpu"),
        (raising(KeyError("position 5")), Verdict.OBSCURE, "position 5"),
        (raising(ValueError("generator cpu")), Verdict.OBSCURE, "ValueError"),
        (raising(Unsupported("has no such thing")), Verdict.NOT_RUN, "wrong has no such thing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_verdicts(run: Run, verdict: Verdict, detail: str) -> None:
    found = judge(SIMPLE, Wrong(run))
    assert found.verdict is verdict
    assert detail in found.detail


def test_more_replays_than_are_needed() -> None:
    case = Case("G8", "one replay", program=program, replays=1)
    assert judge(case, Wrong(checkpoint)).verdict is Verdict.EXACT
    found = judge(case, Wrong(ran_three_times))
    assert found == Outcome(Verdict.SILENT, "2 replays where 1 are enough")


def test_only_an_error_is_right_for_what_is_not_reproducible() -> None:
    case = Case("R9", "not reproducible", program=program, reproducible=False)
    assert judge(case, Wrong(checkpoint)).verdict is Verdict.SILENT


def test_only_an_error_is_right_where_plain_autograd_raises() -> None:
    def raises_plainly(use: Implementation) -> Any:
        use.tick()
        if use.plain:
            raise RuntimeError("modified in place")
        return []

    case = Case("S3", "raises", program=raises_plainly, plain_raises=True)
    assert judge(case, Wrong(checkpoint)).verdict is Verdict.SILENT


def test_a_broken_case_is_no_verdict() -> None:
    def fails(use: Implementation) -> Any:
        raise RuntimeError("broken")

    with pytest.raises(SuiteError, match=r"R1: broken: the plain program raised: RuntimeError"):
        judge(Case("R1", "broken", program=fails), Wrong(checkpoint))
    with pytest.raises(SuiteError, match=r"R1: untold: .*use\.tick"):
        judge(Case("R1", "untold", program=lambda use: []), Wrong(checkpoint))


def test_a_process_that_dies_is_an_error() -> None:
    case = Case("R1", "no such case", program=program, fresh_process=True)
    found = play_here(case, find("plain"))
    assert found.error is None
    with pytest.raises(SuiteError, match="ProcessDied: the process ended with status 1"):
        judge(case, Wrong(checkpoint))


def test_a_play_leaves_nothing_changed() -> None:
    def changes_everything(use: Implementation) -> Any:
        use.tick()
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        torch.backends.cuda.enable_flash_sdp(False)
        torch.set_autocast_enabled("cpu", True)
        torch.set_grad_enabled(False)
        torch.overrides._push_mode(torch.overrides.BaseTorchFunctionMode())
        torch.rand(3), random.random()
        raise RuntimeError("on purpose")

    def state() -> list[Any]:
        return [
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch._C._len_torch_function_stack(),
            torch.get_rng_state().tolist(),
            random.getstate(),
        ]

    before = state()
    played = play_here(Case("A3", "changes", program=changes_everything), find("plain"))
    assert played.error == Raised.of(RuntimeError("on purpose"))
    assert state() == before


def test_what_is_compared() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert difference(freeze([nan]), freeze([nan.clone()])) is None
    assert difference(freeze(nan), freeze(-nan)) == "result: other bits"
    assert difference(freeze(torch.zeros(2)), freeze(torch.zeros(2).double())) is not None
    assert difference(freeze({"a": 1}), freeze({"b": 1})) is not None
    assert difference(freeze([1]), freeze([1, 2])) is not None
    assert difference(freeze(1), freeze(True)) is not None


def test_a_detail_is_the_same_on_every_machine() -> None:
    text = 'at "/home/me/.venv/lib/x.py", line 3\n  <object at 0x7f00aa>, a/b, 1 / 2'
    assert one_line(text) == 'at "x.py", line 3 <object at 0x...>, a/b, 1 / 2'
    assert len(one_line("a" * 999)) == 160


def test_the_table_can_be_read_back() -> None:
    cases = [Case("R1", "a | b", program=program), Case("Q3", "c_d", program=program)]
    columns = [Column("torch.utils.checkpoint", "torch", "1"), Column("x:y", "x:y", None)]
    results = {
        (case.key, column.spec): Result(Outcome(Verdict.SILENT, "result[0]: | other"))
        for case in cases
        for column in columns
    }
    text = page.markdown(cases, columns, results, "torch 1")
    assert page.table_rows(text) == [("R1", "a | b"), ("Q3", "c_d")]


def test_somebody_elses_implementation(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from torch.utils.checkpoint import checkpoint as mine\n"
    )
    saved = tmp_path / "saved.json"
    command = [sys.executable, str(RUN), "--implementation", "elsewhere:mine", "--only", "R1,G8"]
    without = ["torch.utils.checkpoint", "torch_reprise", "torch_remat"]
    for name in without:
        command += ["--without", name]
    result = subprocess.run(
        [*command, "--save", str(saved)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "elsewhere:mine: R1: torch.Generator in a closure: silently different" in result.stderr
    verdicts = {v["case"]: v["verdict"] for v in json.loads(saved.read_text())["verdicts"]}
    assert verdicts["R1: torch.Generator in a closure"] == "silently different"
    # The module has no GraphExecGroup of its own.
    assert not any(key.startswith("G8") for key in verdicts)


def test_a_class_can_be_named_as_well() -> None:
    found = find(f"{Made.__module__}:Made")
    assert isinstance(found, Made) and found.spec.endswith(":Made")
    assert isinstance(find("torch.utils.checkpoint:checkpoint"), LikeTorch)


class Made(Implementation):
    pass
