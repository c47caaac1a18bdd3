"""The benchmarks measure what they say: checked on what they run and compute, never on a time."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_reprise import Checkpointer, CheckpointPolicy, checkpoint, ledger
from torch_reprise import __main__ as cli
from torch_reprise._bench import (
    _child,
    _common,
    _programs,
    _rng_cases,
    memory,
    overhead,
    replay,
    rng,
    scaling,
    selective,
    training,
)
from torch_reprise._bench._command import Command, Options
from torch_reprise._demo.run import MemoryTrace

pytest.importorskip("rich", reason="the benchmarks print with rich")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "overhead": "overhead.py",
    "replay": "replay.py",
    "selective": "selective.py",
    "rng": "rng_stash.py",
    "scaling": "scaling.py",
    "memory": "memory.py",
    "training": "training.py",
}
DRAWING: dict[str, ModuleType] = {
    "rng": rng,
    "scaling": scaling,
    "memory": memory,
    "training": training,
}
every_drawing = pytest.mark.parametrize("name", DRAWING)


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
        assert (row["again_overhead_us"] == "") == (row["form"] == "reentrant")
        torch_figure = float(row["torch_overhead_us"])
        if torch_figure > 0:
            assert float(row["ratio"]) == pytest.approx(figure / torch_figure)
        else:
            assert row["ratio"] == ""
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert torch.__version__ in printed and "1 thread(s)" in printed and "cores" in printed


def test_torch_remat_is_measured_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[dict[str, Any]] = []

    def stand_in(**options: Any) -> Callable[[Any], Any]:
        made.append(options)
        return lambda function: partial(checkpoint, function, use_reentrant=False)

    module = ModuleType("torch_remat")
    module.checkpoint = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_remat", module)
    path = tmp_path / "overhead.csv"
    assert overhead.main(["--quick", "--csv", str(path)]) == 0
    ((hook,),) = made[0].values()
    state = hook.snapshot()
    torch.rand(3)
    hook.restore(state)
    assert torch.equal(torch.get_rng_state(), state)
    for row in read(path):
        assert (row["remat_overhead_us"] == "") == (row["form"] == "reentrant")
    assert "torch_remat" in capsys.readouterr().out


def test_replay_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "replay.csv"
    assert replay.main(["--quick", "--csv", str(path)]) == 0
    rows = read(path)
    assert tuple(rows[0]) == replay.COLUMNS
    options = {(r["program"], r["variant"]) for r in rows if r["measurement"] == "added"}
    assert options == {
        *((p, o) for p in replay.programs() for o in replay.OPTIONS),
        *((p, w) for p in replay.watched_programs() for w in replay.WATCHING),
    }
    assert all(float(r["value"]) > 0 for r in rows if r["measurement"] in ("step", "bitwise"))
    assert "BatchNorm" in capsys.readouterr().out


@pytest.mark.parametrize("name", replay.WATCHING)
def test_replay_watches_as_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, bool]] = []  # rows of the recording, and whether it has events
    options: list[dict[str, Any]] = []

    def checkpointer(**given: Any) -> Checkpointer:
        options.append(given)
        return Checkpointer(**given)

    monkeypatch.setattr(replay, "Checkpointer", checkpointer)
    around, given = replay.WATCHING[name]

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        with around() as recording:
            yield
        if isinstance(recording, ledger.Recording):
            found.append((len(recording.rows), any(recording.events)))

    value = torch.randn(2, requires_grad=True)
    replay.watched_step((watched, given), torch.tanh, value)
    assert value.grad is not None
    assert found == {
        "recording": [(replay.SEGMENTS, True)],
        "recording, no events": [(replay.SEGMENTS, False)],
    }.get(name, [])
    assert options == [
        {"bitwise": {"determinism_check": "bitwise"}, "debug": {"debug": True}}.get(name, {})
    ]


def test_selective_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "selective.csv"
    assert selective.main(["--quick", "--csv", str(path)]) == 0
    rows = read(path)
    assert tuple(rows[0]) == selective.COLUMNS
    assert {(r["policy"], r["variant"]) for r in rows} == {
        (policy, variant) for policy in selective.POLICIES for variant in ("plain", "torch", "ours")
    }
    assert all(float(r["step_us"]) > 0 for r in rows)
    assert all((r["added_us"] == "") == (r["variant"] == "plain") for r in rows)
    assert "save the products" in capsys.readouterr().out


def test_the_policies_save_what_they_say() -> None:
    aten = torch.ops.aten
    saves = {
        name: [
            policy(None, operator, None) is CheckpointPolicy.MUST_SAVE
            for operator in (
                aten.addmm.default,
                aten._scaled_dot_product_flash_attention_for_cpu.default,
                aten.tanh.default,
            )
        ]
        for name, policy in selective.POLICIES.items()
    }
    assert saves == {
        "save the products": [True, True, False],
        "save attention": [False, True, False],
        "save nothing": [False, False, False],
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_the_module(name: str, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / SCRIPTS[name]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"bench {name}" in done.stdout
    options = {
        "--quick",
        "--csv",
        "--rounds",
        *(["--plot", "--no-plot"] if name in DRAWING else []),
    }
    assert all(option in done.stdout for option in options)


def test_every_benchmark_has_a_script() -> None:
    assert cli._benchmarks() == sorted(SCRIPTS)
    assert all((ROOT / "benchmarks" / script).is_file() for script in SCRIPTS.values())


def test_every_column_is_documented() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name, module in {
        "overhead": overhead,
        "replay": replay,
        "selective": selective,
        **DRAWING,
    }.items():
        section = text.split(f"## {SCRIPTS[name]}:", 1)[1].split("\n## ", 1)[0]
        assert [column for column in module.COLUMNS if f"`{column}`" not in section] == [], name


def test_bench_all_runs_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, list[str]]] = []

    def run(module: str, argv: list[str]) -> int:
        ran.append((module.rpartition(".")[2], argv))
        return int(module.endswith("rng"))

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["bench", "all", "--quick"]) == 1, "the status of the one that failed"
    assert ran == [(name, ["--quick"]) for name in sorted(SCRIPTS)]
    assert "== scaling" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "all", "--csv", "x"])
    assert "bench all takes no option but --quick" in capsys.readouterr().err


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
        assert len(workload.gradients(_programs.plainly)) == len(workload.leaves)
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
    for column in ("ratio", *overhead.OTHERS.values()):
        assert [line[overhead.COLUMNS.index(column)] for line in lines] == [""] * 4
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


# --- the benchmarks that draw


@dataclass
class Done:
    """What one quick run left behind."""

    rows: list[dict[str, str]]
    printed: str
    picture: bytes


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """Runs a benchmark with --quick, once for all tests."""
    done: dict[str, Done] = {}

    def run(name: str) -> Done:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            table, picture = folder / "figures.csv", folder / "picture.png"
            threads, state = torch.get_num_threads(), torch.get_rng_state()
            argv = ["--quick", "--csv", str(table), "--plot", str(picture)]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert DRAWING[name].main(argv) == 0
            assert torch.get_num_threads() == threads
            assert torch.equal(torch.get_rng_state(), state)
            done[name] = Done(read(table), printed.getvalue(), picture.read_bytes())
        return done[name]

    return run


@every_drawing
def test_quick_runs_write_tables_and_pictures(name: str, quick: Callable[[str], Done]) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")
    done = quick(name)
    assert tuple(done.rows[0]) == DRAWING[name].COLUMNS
    assert done.picture.startswith(b"\x89PNG")
    assert torch.__version__ in done.printed and "1 thread(s)" in done.printed
    assert "--quick: too few" in done.printed and "figures.csv" in done.printed


def test_scaling_has_every_size(quick: Callable[[str], Done]) -> None:
    rows = quick("scaling").rows
    found = {(row["sweep"], row["form"], row["implementation"], int(row["size"])) for row in rows}
    assert found == {
        (sweep.name, form, name, size)
        for sweep in scaling.sweeps(quick=True)
        for form in sweep.forms
        for name in ("torch", "ours")
        for size in sweep.sizes
    }
    for row in rows:
        units = int(row["units"])
        assert float(row["per_unit_us"]) == pytest.approx(float(row["overhead_us"]) / units)
        assert (row["added_us"] == "") == (units == 1)
        if row["sweep"] == "nested" and row["implementation"] == "ours":
            depth = int(row["size"])
            assert units == depth * (depth + 1) // 2
        if row["sweep"] != "nested" and row["statistic"] == "min":
            step, plain, forward = (
                float(row[column]) for column in ("step_us", "plain_us", "forward_us")
            )
            assert float(row["overhead_us"]) == pytest.approx(step - plain - forward)


def test_training_has_every_variant(quick: Callable[[str], Done]) -> None:
    rows = quick("training").rows
    assert len(rows) == len(training.shapes(quick=True, device="cpu")) * 5 * 2
    for row in rows:
        tokens = int(row["batch"]) * int(row["length"])
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * tokens / float(row["step_ms"]))
        assert int(row["peak_bytes"]) >= int(row["held_bytes"]) > 0
        assert float(row["to_plain"]) == 1 or row["implementation"] != "plain"
        assert (row["to_torch"] == "") == (row["implementation"] == "plain")
        assert float(row["to_torch"] or 1) == 1 or row["implementation"] == "ours"
    held = {row["implementation"]: int(row["held_bytes"]) for row in rows}
    assert held["ours"] <= held["torch"] < held["plain"]


def test_memory_has_every_measurement(quick: Callable[[str], Done]) -> None:
    rows = quick("memory").rows
    kinds = ["random", "gpt step", "freed"]
    if memory.can_read_resident_bytes():
        kinds.append("resident")
    assert {row["measurement"] for row in rows} == set(kinds)
    figures = {
        (row["measurement"], row["program"], row["implementation"], row["form"]): row["value"]
        for row in rows
    }
    for form in _programs.FORMS:
        assert figures["random", "draws nothing", "ours", form] == "0.0"
        for program in ("draws", "draws nothing"):
            assert float(figures["random", program, "torch", form]) == torch.get_rng_state().nbytes
    for row in rows:
        if row["measurement"] == "resident":
            assert row["form"] != "reentrant", "left out to be quick"
            # Autograd saves 24 tensors: no segment without checkpointing is smaller than those.
            assert float(row["value"]) > (24 * 64 if row["implementation"] == "plain" else 0)
        if row["measurement"] == "freed":
            assert row["unit"] == "tensors"
            assert row["quantity"] == f"alive at layer {row['value']}"


def test_rng_has_every_operation(quick: Callable[[str], Done]) -> None:
    rows = quick("rng").rows
    on_cpu = [row for row in rows if row["devices"] == "CPU"]
    assert len(on_cpu) == 2 * len(_rng_cases.OPERATIONS) * 2
    assert {row["operation"] for row in on_cpu} == set(_rng_cases.OPERATIONS)
    for row in on_cpu:
        assert row["simulated"] == "False"
        assert float(row["torch_bytes"]) == torch.get_rng_state().nbytes
        assert (float(row["ours_bytes"]) == 0) == (row["draws"] == "none")
    assert {row["devices"] for row in rows} == {
        rng.device_name(count) for count in rng.device_counts(quick=True)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "1"], "--rounds must be at least"),
        (["--rounds", "many"], "invalid int value: 'many'"),
        (["--csv", "no/such/folder/x.csv"], "--csv: there is no folder no/such/folder"),
        (["--plot", "no/such/folder/x.png"], "--plot: there is no folder no/such/folder"),
        (["--plot", "x.gif"], "--plot: the name must end in .png or .pdf or .svg, got x.gif"),
        (["--quik"], "unrecognized arguments: --quik"),
    ],
)
@every_drawing
def test_wrong_options_are_refused(
    name: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        DRAWING[name].main(options)
    error = capsys.readouterr().err
    assert message in error and f"usage: bench {name}" in error


@every_drawing
def test_packages_are_asked_for_before_anything_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert DRAWING[name].main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: matplotlib is needed here")
    assert "pip install matplotlib, or use --no-plot" in error
    monkeypatch.setitem(sys.modules, "rich", None)
    assert DRAWING[name].main(["--no-plot"]) == 2
    assert "rich is needed here and not installed: pip install rich" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scaling", "memory", "training"])
def test_what_differs_is_not_measured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def double(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        return function(value) * 2

    functions = _programs.implementations()
    functions["non-reentrant"]["ours"] = double
    assert DRAWING[name].main(["--quick", "--no-plot"], functions) == 1
    printed = capsys.readouterr().out
    assert "gradients differ from the plain step's" in printed
    assert "ours, non-reentrant" in printed and "ours, reentrant" not in printed


def test_a_segment_with_other_random_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _rng_cases.Case(0, "all", 1)
    assert case.wrong() == []
    without = {name: {True: calls[False]} for name, calls in _rng_cases.segment_calls().items()}
    monkeypatch.setattr(_rng_cases, "segment_calls", lambda: without)
    assert case.wrong() == [
        f"{name}, draws from all, 1 tensors a device" for name in ("torch", "ours")
    ]


@pytest.mark.parametrize(
    ("known", "count", "expected"), [(None, 2, "0,1"), ("3,5,GPU-x", 2, "3,5"), ("7", 1, "7")]
)
def test_a_child_sees_the_first_devices(
    known: str | None, count: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rng, "is_simulated", lambda: False)
    if known is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", known)
    assert rng.only_first_devices(count) == {"CUDA_VISIBLE_DEVICES": expected}
    monkeypatch.setattr(rng, "is_simulated", lambda: True)
    assert rng.only_first_devices(count) == {"CUDASIM_DEVICES": str(count)}


def test_as_many_devices_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in [(0, [0]), (1, [0, 1]), (6, [0, 1, 2, 4]), (8, [0, 1, 2, 4, 8])]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert rng.device_counts(quick=False) == expected
    assert rng.device_counts(quick=True) == [0, 1, 2]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1 / 23, "1/23"), (0.75, "0.750"), (1.5, "1.50"), ("", "-"), (-0.2, "-0.200")],
)
def test_fractions(ratio: object, text: str) -> None:
    assert rng.fraction(ratio) == text


def test_replayed_calls_are_counted() -> None:
    for segment in _programs.by_label(_programs.implementations()).values():
        assert scaling.replayed_calls(4, segment) == 4 + 3 + 2 + 1
    assert scaling.replayed_calls(4, _programs.plainly) == 0


def test_what_each_unit_adds() -> None:
    nothing = _common.Summary(0.0, 0.0)
    first = scaling.Point(
        "segments", "ours", 2, 2, 3, 1, nothing, nothing, nothing, _common.Summary(10.0, 12.0)
    )
    second = replace(first, size=6, units=6, overhead=_common.Summary(18.0, 24.0))
    assert first.per_unit("min") == 5.0 and second.per_unit("median") == 4.0
    assert first.added(first, "min") is None
    assert second.added(first, "min") == 2.0 and second.added(first, "median") == 3.0
    assert scaling.spread([2.0, 2.5]) == "2.00 to 2.50 us, within 25 %"
    assert scaling.spread([-1.0, 2.5]) == "-1.00 to 2.50 us"


def test_programs_of_the_sweeps_are_what_they_are_called() -> None:
    for size in (1, 5):
        before = ledger.segments(), ledger.live_slots()
        alive = _programs.saved_tensors(size).forward(partial(checkpoint, use_reentrant=False))
        assert ledger.segments() - before[0] == 1 and ledger.live_slots() - before[1] == size
        del alive
        alive = _programs.nested(size).forward(partial(checkpoint, use_reentrant=False))
        assert ledger.segments() - before[0] == 1 + size
        del alive


def test_memory_says_what_does_not_hold() -> None:
    labels = [_programs.PLAIN, *_programs.by_label(_programs.implementations())]
    draws_nothing = dict.fromkeys(labels, 0.0)
    good = memory.Found(
        "GPT",
        {label: MemoryTrace([10], [20]) for label in labels},
        {label: [2, 1] for label in labels},
        {"draws": draws_nothing, "draws nothing": draws_nothing},
    )
    assert memory.failures(good) == []
    bad = replace(
        good,
        gpt={**good.gpt, "ours, reentrant": MemoryTrace([10], [25])},
        alive={**good.alive, "ours, non-reentrant": [2, 2]},
        random={"draws nothing": {**draws_nothing, "ours, reentrant": 16.0}},
    )
    assert memory.failures(bad) == [
        "ours, non-reentrant: a recomputed tensor is freed later than in a plain run",
        "GPT step, reentrant: peak is 5 bytes above torch's",
        "ours, reentrant: a segment that draws nothing keeps a random state",
    ]


def test_random_bytes_of_both_libraries() -> None:
    x = torch.ones(4, requires_grad=True)
    for name, calls in _rng_cases.segment_calls().items():
        segment = partial(calls[True], torch.nn.functional.dropout, x)
        expected = torch.get_rng_state().nbytes if name == "torch" else None
        found = _programs.random_bytes(segment, segments=300)
        assert found.each == expected or (expected is None and found.each > 0)
        assert _programs.random_bytes(partial(torch.tanh, x), segments=3) == (0, 0)


def test_a_failed_check_is_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    from torch_reprise._bench._command import Report

    command = Command("some", "Some benchmark.", draws=False)
    seen: list[Options] = []

    def measure(screen: _common.Screen, options: Options) -> Report:
        seen.append(options)
        return Report([], ("a",), [], remarks=["a remark"], failures=["does not hold"])

    assert command.run(["--rounds", "15"], measure) == 1
    printed = capsys.readouterr().out
    assert "a remark" in printed and "does not hold" in printed
    assert seen == [Options(rounds=15, target_s=0.02, quick=False, csv=None, plot=None)]


def test_a_child_tells_and_returns() -> None:
    notes: list[str] = []
    rows = {"count": 0, "quick": True, "rounds": 1, "target_s": 1e-5}
    result = _child.call(_rng_cases.__name__, "measure", rows, on_note=notes.append)
    assert result["wrong"] == [] and len(result["rows"]) == 2 * len(_rng_cases.OPERATIONS) * 2
    # A round of the operations and one of the steps, for each case.
    assert notes == [f"draws from {k}, 1 tensors a device" for k in ("all", "all", "none", "none")]


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)memory\.grow failed in a process.*KeyError: 'no'"):
        _child.call(memory.__name__, "grow", {"label": "no", "segments": 1})
