"""The package as a build product: handshake, `python -m torch_reprise`, import cost, sdist."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import torch_reprise
from torch_reprise import __main__ as cli
from torch_reprise._build_info import INFO
from torch_reprise._handshake import check, running_python_tag

ROOT = Path(__file__).resolve().parent.parent


def run_python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, outside of the checkout so that only the installed package is found."""
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


# --- handshake


def running() -> tuple[str, str | None, str]:
    return str(torch.__version__), torch.version.cuda, running_python_tag()


def test_handshake_accepts_the_running_process() -> None:
    check(INFO, *running())


@pytest.mark.parametrize(
    ("field", "forged", "name"),
    [
        ("torch_version", "2.12.9+cpu", "torch"),
        ("cuda_version", "12.3", "CUDA"),
        ("python_tag", "cp39", "Python"),
    ],
)
def test_handshake_names_both_versions(field: str, forged: str, name: str) -> None:
    info = dataclasses.replace(INFO, **{field: forged})
    now = getattr(INFO, field) or "none"
    with pytest.raises(ImportError, match="built for another environment") as caught:
        check(info, *running())
    message = str(caught.value)
    assert f"{name}: built for {forged}, running {now}" in message
    # The one difference, and no other.
    assert message.count("built for") == 2
    pip = "pip install --force-reinstall --no-cache-dir --no-build-isolation --no-deps"
    assert f"  {pip} torch-reprise\n" in message
    assert message.endswith(f"  {pip} .")


def test_handshake_tells_cuda_from_no_cuda() -> None:
    info = dataclasses.replace(INFO, cuda_version=None)
    with pytest.raises(ImportError, match=r"CUDA: built for none, running 13\.0"):
        check(info, info.torch_version, "13.0", info.python_tag)


def test_handshake_tells_builds_of_one_release_apart() -> None:
    info = dataclasses.replace(INFO, torch_version="2.13.0+cpu")
    with pytest.raises(ImportError, match=r"torch: built for 2\.13\.0\+cpu, running 2\.13\.0\+cu"):
        check(info, "2.13.0+cu130", info.cuda_version, info.python_tag)


def test_handshake_names_every_difference() -> None:
    with pytest.raises(ImportError) as caught:
        check(INFO, "3.0.0", "99.9", "cp399")
    for name in ("torch", "CUDA", "Python"):
        assert f"  {name}: built for" in str(caught.value)


def test_mismatch_is_found_before_the_extension_is_loaded(tmp_path: Path) -> None:
    forge = (
        "import sys, torch\n"
        "torch.__version__ = '2.12.9+forged'\n"
        "try:\n"
        "    import torch_reprise\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print('loaded' if 'torch_reprise._C' in sys.modules else 'not loaded')\n"
    )
    result = run_python("-c", forge, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "running 2.12.9+forged" in result.stdout
    assert result.stdout.rstrip().endswith("\nnot loaded")


# --- build information


def test_build_info_describes_this_build() -> None:
    assert INFO.version == torch_reprise.__version__
    assert INFO.torch_version == str(torch.__version__)
    assert INFO.cuda_version == torch.version.cuda
    assert INFO.python_tag == running_python_tag()
    assert INFO.compiler.split()[0] in {"GNU", "Clang", "AppleClang", "IntelLLVM"}
    assert INFO.build_type in {"Release", "RelWithDebInfo", "Debug", "MinSizeRel"}


# --- command line


def test_info_prints_versions_flags_and_devices(tmp_path: Path) -> None:
    result = run_python("-m", "torch_reprise", "info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = {
        line[:15].strip(): line[15:] for line in result.stdout.splitlines() if line[:15].strip()
    }
    assert lines["torch-reprise"] == torch_reprise.__version__
    assert lines["torch"] == str(torch.__version__)
    assert lines["CUDA"].startswith(torch.version.cuda or "none")
    assert running_python_tag() in lines["Python"]
    assert INFO.compiler in lines["built with"]
    assert lines["flags"] == (INFO.cxx_flags or "none")
    assert lines["devices"].startswith("cpu (")


def test_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "required: command" in capsys.readouterr().err


def test_unknown_argument_of_info(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", "--loud"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --loud" in capsys.readouterr().err


def test_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "no_such"])
    assert caught.value.code == 2
    assert "no benchmark 'no_such'; there are: " in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_missing_optional_dependency_is_named(
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "needs_it.py").write_text(f"import {missing}.something\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "needs_it", raising=False)
    # None makes the import system say that there is no such module.
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli._run("needs_it", []) == 2
    error = capsys.readouterr().err
    assert f"needs {missing}, which is not installed" in error
    assert "pip install 'torch-reprise[demo]'" in error


def test_other_missing_modules_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_command.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        cli._run("broken_command", [])


@pytest.mark.parametrize(("returned", "status"), [("None", 0), ("3", 3)])
def test_arguments_and_status_pass_through(
    returned: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"command_{status}"
    (tmp_path / f"{name}.py").write_text(
        f"seen = []\ndef main(argv):\n    seen.extend(argv)\n    return {returned}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli._run(name, ["--steps", "5"]) == status
    assert sys.modules[name].seen == ["--steps", "5"]


@pytest.mark.parametrize("argv", [["--help"], ["--steps", "5", "--out", "x"]])
def test_options_behind_demo_belong_to_the_demo(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(cli, "_run", lambda module, rest: calls.append((module, rest)) or 0)
    assert cli.main(["demo", *argv]) == 0
    assert calls == [("torch_reprise._demo.run", argv)]


def test_options_behind_bench_belong_to_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(cli, "_run", lambda module, rest: calls.append((module, rest)) or 0)
    monkeypatch.setattr(cli, "_benchmarks", lambda: ["overhead"])
    assert cli.main(["bench", "overhead", "--rounds", "3"]) == 0
    assert calls == [("torch_reprise._bench.overhead", ["--rounds", "3"])]


# --- import


def test_import_pulls_in_nothing_heavy(tmp_path: Path) -> None:
    """Beyond what `import torch` loads, only our own modules and the standard library come in."""
    program = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import torch_reprise\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    result = run_python("-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    added = json.loads(result.stdout)
    assert "torch_reprise._C" in added
    top_level = {name.partition(".")[0] for name in added}
    assert top_level - set(sys.stdlib_module_names) <= {"torch_reprise", "torch"}, added
    # torch's own lazy parts cost seconds.
    lazy = ("torch._dynamo", "torch._inductor", "torch.distributed", "torch.export", "torch.onnx")
    assert [name for name in added if name.startswith(lazy)] == []
    # The commands' modules, and what they import, wait for the commands.
    commands = ("torch_reprise.__main__", "torch_reprise._demo", "torch_reprise._bench")
    assert [name for name in added if name.startswith(commands)] == []


def test_import_time_is_reported(tmp_path: Path) -> None:
    """Prints what `import torch_reprise` costs over `import torch` (`pytest -s -k import_time`).

    The aim is at most 50 ms. It is not asserted: the figure follows the load of the machine.
    """
    result = run_python("-X", "importtime", "-c", "import torch, torch_reprise", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # Lines are "import time: self us | cumulative us | name", the name indented by its depth.
    rows = [line.split("|") for line in result.stderr.splitlines() if line.count("|") == 2]
    cumulative = {name.removeprefix(" "): microseconds for _, microseconds, name in rows}
    assert {"torch", "torch_reprise"} <= cumulative.keys()
    print(f"\nimport torch_reprise: {int(cumulative['torch_reprise']) / 1000:.1f} ms")


# --- sdist


def test_sdist_has_what_a_build_needs(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="builds an sdist")
    program = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    result = run_python("-c", program, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    root = f"torch_reprise-{torch_reprise.__version__}"
    assert archive.name == f"{root}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {name.removeprefix(f"{root}/") for name in tar.getnames()}
    needed = [ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")]
    for folder, pattern in (("cmake", "*"), ("csrc", "*.*"), ("python", "*.py*")):
        needed += [path for path in (ROOT / folder).rglob(pattern) if path.is_file()]
    missing = {str(path.relative_to(ROOT)) for path in needed} - names
    assert {name for name in missing if "__pycache__" not in name} == set()
    assert "python/torch_reprise/py.typed" in names
    # Nothing that a build or an environment leaves behind.
    folders = {name.partition("/")[0] for name in names}
    assert {name for name in folders if name.startswith((".venv", "build"))} == set()
    assert {name for name in names if name.endswith((".so", ".o", ".pyc"))} == set()
