"""The benchmarks measure what they say: checked on what they run and compute, never on a time."""

from __future__ import annotations

import csv
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torch_reprise._bench import _common, overhead

pytest.importorskip("rich", reason="the benchmarks print with rich")

ROOT = Path(__file__).resolve().parent.parent


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_overhead_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "overhead.csv"
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert overhead.main(["--quick", "--csv", str(path)]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    rows = read(path)
    assert tuple(rows[0]) == overhead.COLUMNS
    names = [workload.name for workload in overhead.workloads()]
    assert [(row["workload"], row["form"], row["statistic"]) for row in rows] == [
        (name, form, statistic)
        for name in names
        for form in ("non-reentrant", "reentrant")
        for statistic in ("min", "median")
    ]
    for row in rows:
        assert int(row["rounds"]) == 3 and int(row["inner"]) >= 1
        assert float(row["plain_us"]) > 0 and float(row["forward_us"]) > 0
        figure = float(row["ours_overhead_us"])
        if row["statistic"] == "min":
            step, plain, forward = (
                float(row[name]) for name in ("ours_step_us", "plain_us", "forward_us")
            )
            assert figure == pytest.approx(step - plain - forward)
        torch_figure = float(row["torch_overhead_us"])
        if torch_figure > 0:
            assert float(row["ratio"]) == pytest.approx(figure / torch_figure)
        else:
            assert row["ratio"] == ""
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert torch.__version__ in printed and "1 thread(s)" in printed and "cores" in printed


def test_the_script_is_the_module(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "overhead.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout and "--csv" in done.stdout


def test_wrong_gradients_are_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    def double(function: object, value: Tensor) -> Tensor:
        result: Tensor = function(value)  # type: ignore[operator]
        return result * 2

    functions = overhead.implementations()
    functions["reentrant"]["ours"] = double
    assert overhead.main(["--quick"], functions) == 1
    printed = capsys.readouterr().out
    assert printed.count("gradients differ from the plain step's") == len(overhead.workloads())
    assert "ours, reentrant" in printed and "ours, non-reentrant" not in printed


def test_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        overhead.main(["--rounds", "14"])
    assert "--rounds must be at least 15, got 14" in capsys.readouterr().err


def test_rich_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert overhead.main(["--quick"]) == 2
    assert "pip install rich" in capsys.readouterr().err


def test_workloads_are_what_they_are_called() -> None:
    def saved_by(workload: overhead.Workload) -> int:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            workload.forward()
        return len(saved)

    one, layers, blocks = overhead.workloads()
    assert (one.divisor, layers.divisor, blocks.divisor) == (100, 1, 1)
    assert (len(one.chain), len(layers.chain), len(blocks.chain)) == (100, 1, 12)
    assert saved_by(one) == 100  # one each
    assert saved_by(layers) == 24
    for workload in (one, layers, blocks):
        assert len(workload.gradients(overhead.plainly)) == len(workload.leaves)
        assert all(leaf.grad is None for leaf in workload.leaves)


def test_interleaving_rotates_and_keeps_the_collector_out() -> None:
    order: list[str] = []
    collector: set[bool] = set()

    def variant(name: str) -> _common.Thunk:
        def run() -> None:
            order.append(name)
            collector.add(gc.isenabled())

        return run

    assert gc.isenabled()
    rounds_done: list[int] = []
    times = _common.interleave(
        {name: variant(name) for name in "abc"},
        rounds=4,
        inner=2,
        after_round=lambda: rounds_done.append(len(order)),
    )
    assert gc.isenabled()
    warm_up, timed = order[:3], order[3:]
    assert "".join(warm_up) == "abc"
    assert "".join(timed) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert collector == {True, False}  # on in the warm-up alone
    assert rounds_done == [9, 15, 21, 27]
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_collector_comes_back_after_an_error() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("from the variant")

    with pytest.raises(RuntimeError, match="from the variant"), _common.collector_off():
        fail()
    assert gc.isenabled()


def test_overheads_are_taken_round_by_round() -> None:
    result = _common.Overheads(
        plain=[10.0, 11.0, 30.0],
        forward=[4.0, 3.0, 9.0],
        steps={"x": [20.0, 16.0, 48.0]},
        inner=1,
    )
    assert result.rounds == 3
    # min: 16 - 10 - 3; median: of 6, 2 and 9
    assert result.of("x") == _common.Summary(min=3.0, median=6.0)
    assert _common.Summary.of([3.0, 1.0, 2.5]) == _common.Summary(min=1.0, median=2.5)


def test_a_figure_without_a_torch_figure_has_no_ratio() -> None:
    workload = overhead.workloads()[1]
    steps = {f"{name}, {form}": [3.0] for name in ("torch", "ours") for form in overhead.FORMS}
    result = _common.Overheads(plain=[2.0], forward=[2.0], steps=steps, inner=1)
    lines = overhead.rows(workload, result)
    assert [line[-1] for line in lines] == [""] * 4
    assert "- / -" in overhead.table([workload], lines).rows[0]


def test_calibration_reaches_the_target() -> None:
    calls: list[None] = []
    inner = _common.calibrate(lambda: calls.append(None), target_s=1e-3)
    assert 1 < inner
    assert _common.calibrate(lambda: sum(range(10**5)), target_s=1e-9) == 1


def test_a_pipe_gets_ten_lines_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    screen = _common.Screen()
    assert not screen.is_terminal
    with screen.progress("work", 25) as bar:
        for number in range(25):
            bar.step(f"note {number}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == "work: 3/25  note 2" and lines[-1] == "work: 25/25  note 24"


def test_a_row_has_to_fit_its_table() -> None:
    table = _common.Table("title", ("a", "b"))
    with pytest.raises(ValueError, match="table has 2 columns, got 1 cells"):
        table.add("x")


def test_facts_name_what_matters() -> None:
    facts = _common.machine_facts()
    assert facts["torch"] == torch.__version__
    assert int(facts["cores"]) >= 1 and int(facts["threads"]) == torch.get_num_threads()
    assert facts["processor"]


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (("math",), None),
        (("math", "no_such_package"), "no_such_package is needed here and not installed: pip inst"),
        (("no_such_a", "no_such_b"), "no_such_a and no_such_b are needed here and not installed"),
    ],
)
def test_missing_packages(packages: tuple[str, ...], message: str | None) -> None:
    found = _common.missing(*packages)
    assert found is None if message is None else found is not None and message in found
