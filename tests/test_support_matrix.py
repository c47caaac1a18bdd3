"""The support matrix: a run of tests writes down what it was; the README says no more than that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_reprise

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "packaging"))

import ci_record  # noqa: E402
import manifest  # noqa: E402
import support_matrix  # noqa: E402

# --- records

PROGRAM = """\
import pytest

def test_passes():
    pass

def test_passes_too():
    pass

def test_skips():
    pytest.skip("for the record")

def test_fails():
    assert {fails} is False
"""


def run_pytest(folder: Path, *arguments: str, fails: bool = False) -> dict[str, Any]:
    """The record of a run of pytest on PROGRAM, in a process of its own."""
    (folder / "test_program.py").write_text(PROGRAM.format(fails=fails))
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "ci_record", "--record", "out/test.json"]
    path = os.pathsep.join([str(ROOT / "packaging"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*command, "test_program.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        timeout=300,
        check=False,
    )
    record: dict[str, Any] = json.loads((folder / "out" / "test.json").read_text())
    return record


def test_a_record_says_what_ran_and_where(tmp_path: Path) -> None:
    record = run_pytest(tmp_path)
    assert {name: record[name] for name in ci_record.environment()} == ci_record.environment()
    assert record["torch"] == str(torch.__version__)
    assert record["torch_reprise"] == torch_reprise.__version__
    assert record["paths"] == ["test_program.py"]
    counts = ("passed", "failed", "skipped", "left_out", "exit_status")
    assert [record[name] for name in counts] == [3, 0, 1, 0, 0]


def test_a_record_says_what_was_left_out_and_what_failed(tmp_path: Path) -> None:
    record = run_pytest(tmp_path, "-k", "too or fails", fails=True)
    counts = ("passed", "failed", "skipped", "left_out", "exit_status")
    assert [record[name] for name in counts] == [1, 1, 0, 2, 1]


def test_the_record_of_the_native_tests(tmp_path: Path) -> None:
    report = tmp_path / "native.xml"
    report.write_text('<testsuite tests="6" failures="1" disabled="1" skipped="1"></testsuite>')
    ci_record.main([str(report)])
    record = json.loads((tmp_path / "native.json").read_text())
    counts = ("passed", "failed", "skipped", "left_out", "exit_status")
    assert [record[name] for name in counts] == [3, 1, 1, 1, 1]
    assert record["paths"] == ["ctest"]
    assert record["torch"] == str(torch.__version__)


# --- what a record confirms

CPU, CUDA = "2.13.0+cpu", "2.14.1+cu130"


def record_of(step: str, **changes: Any) -> dict[str, Any]:
    known = manifest.steps()[step]
    record = {
        "torch_reprise": "0.1.0",
        "torch": CPU,
        "cuda": None,
        "cuda_devices": 0,
        "simulated": known.simulated,
        "python": "3.11",
        "system": "Linux x86_64",
        "paths": list(known.paths),
        "left_out": 0,
        "passed": 10,
        "failed": 0,
        "skipped": 2,
        "exit_status": 0,
    }
    return {**record, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"torch": "1.9.0"}, "has no torch 1.9.0"),
        ({"paths": ["tests/test_rng.py"]}, "ran tests/test_rng.py, a whole run is tests"),
        ({"left_out": 7}, "left out 7 tests"),
        ({"failed": 1, "exit_status": 1}, "1 tests failed, exit status 1"),
        ({"exit_status": 1}, "0 tests failed, exit status 1"),
        ({"passed": 0}, "no test passed"),
        ({"simulated": True}, "simulated is True, expected False"),
    ],
)
def test_what_a_record_confirms(changes: dict[str, Any], reason: str) -> None:
    releases = [entry.release for entry in manifest.torches()]
    found = support_matrix.why_not(record_of("test", **changes), manifest.steps()["test"], releases)
    assert reason in found and bool(reason) == bool(found)


def test_a_step_that_is_not_listed_confirms_nothing() -> None:
    assert "no such step" in support_matrix.why_not(record_of("test"), None, ["2.13.0"])


# --- the table


def write_records(folder: Path, **records: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, record in records.items():
        path = folder / f"{name.replace('_', '-')}.json"
        path.write_text(json.dumps(record))
    return folder


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write_records(
        tmp_path / "ci",
        cudasim=record_of("cudasim", torch=CUDA, cuda="13.0", cuda_devices=8),
        native=record_of("native"),
        test=record_of("test"),
        wheel_2130=record_of("wheel"),
    )


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    text = f"# Title\n\n{support_matrix.BEGIN}\n{support_matrix.END}\n\nThe end.\n"
    path.write_text(text, encoding="utf-8")
    return path


def run(*arguments: str | Path) -> int:
    return support_matrix.main([str(argument) for argument in arguments])


def test_the_table_is_written_between_its_markers(records: Path, readme: Path) -> None:
    assert run("--records", records, "--write", readme) == 0
    assert readme.read_text(encoding="utf-8") == (
        f"# Title\n\n{support_matrix.BEGIN}\n"
        "| torch | CUDA | Python | system | passed in CI |\n"
        "|---|---|---|---|---|\n"
        "| 2.13.0+cpu | none | 3.11 | Linux x86_64 | native tests, Python tests, wheel |\n"
        "| 2.14.1+cu130 | 13.0 | 3.11 | Linux x86_64 | tests on a simulated CUDA |\n"
        f"{support_matrix.END}\n\nThe end.\n"
    )
    assert run("--records", records, "--check", readme) == 0
    assert run("--records", records, "--write", readme) == 0, "a second time it is the same"
    assert readme.read_text(encoding="utf-8").count("simulated CUDA") == 1


def test_a_claim_that_no_record_confirms_is_an_error(
    records: Path, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--records", records, "--write", readme)
    (records / "wheel-2130.json").unlink()
    write_records(records, cudasim=record_of("cudasim", torch=CUDA, cuda="13.0", failed=2))
    assert run("--records", records, "--check", readme) == 1
    error = capsys.readouterr().err
    assert "confirms nothing: cudasim.json: 2 tests failed" in error
    where = "Python 3.11, Linux x86_64"
    says = "README.md says it, no record confirms it: torch"
    assert f"{says} {CPU}, CUDA none, {where}: wheel\n" in error
    assert f"{says} {CUDA}, CUDA 13.0, {where}: tests on a simulated CUDA\n" in error
    assert error.count("no record confirms") == 2


def test_another_python_or_torch_does_not_confirm(records: Path, readme: Path) -> None:
    run("--records", records, "--write", readme)
    write_records(records, test=record_of("test", python="3.12"))
    assert run("--records", records, "--check", readme) == 1


def test_a_readme_that_says_less_is_told_so(
    records: Path, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--records", records, "--write", readme)
    write_records(records, integrations=record_of("integrations"))
    assert run("--records", records, "--check", readme) == 0
    printed = capsys.readouterr().out
    assert "README.md does not say it: torch 2.13.0+cpu" in printed
    assert "tests with other libraries" in printed


def test_no_table_is_written_from_a_run_that_failed(
    records: Path, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = readme.read_text(encoding="utf-8")
    write_records(records, test=record_of("test", failed=1, exit_status=1))
    assert run("--records", records, "--write", readme) == 1
    assert run("--records", records / "none", "--write", readme) == 1
    assert readme.read_text(encoding="utf-8") == before
    assert "no table" in capsys.readouterr().err


def test_a_file_without_the_block_is_refused(records: Path, readme: Path) -> None:
    readme.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README\.md has no block between"):
        run("--records", records, "--write", readme)


def test_an_empty_table_is_refused(records: Path, readme: Path) -> None:
    with pytest.raises(SystemExit, match="no support matrix between the markers"):
        run("--records", records, "--check", readme)


def test_the_readme_names_what_the_manifest_lists() -> None:
    claimed = support_matrix.read((ROOT / "README.md").read_text(encoding="utf-8"))
    releases = {entry.release for entry in manifest.torches()}
    assert {row.torch.partition("+")[0] for row in claimed} <= releases
    known = {step.what for step in manifest.steps().values()}
    assert {what for row in claimed.values() for what in row} <= known


def test_the_makefile_records_the_steps_that_are_listed() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in manifest.steps():
        if name == "native":
            assert "$(abspath $(REPRISE_RECORD))/native.xml" in makefile
        elif name == "wheel":
            assert "$(addprefix --record ,$(REPRISE_RECORD))" in makefile
        else:
            assert f"$(call recorded,{name})" in makefile
