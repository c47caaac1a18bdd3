"""packaging/: a wheel is named after its torch, and what is wrong with a wheel is found.

On wheels made here, without an extension in them; `make wheels` does it with real ones.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "packaging"))

import build_wheels  # noqa: E402
import check_wheel  # noqa: E402
import manifest  # noqa: E402
from label_wheel import _record, build_info, label, label_wheel  # noqa: E402

VERSION = manifest.project()["version"]
INFO = """\
from torch_reprise._handshake import BuildInfo

INFO = BuildInfo(
    version="{version}",
    torch_version="{torch}",
    cuda_version=None,
    python_tag="cp311",
    compiler="GNU 14.2.0",
    build_type="{build_type}",
    cxx_flags="-O3",
)
"""


def files_of(torch: str = "2.13.0+cpu", build_type: str = "Release") -> dict[str, bytes]:
    metadata = f"Metadata-Version: 2.4\nName: torch-reprise\nVersion: {VERSION}\n"
    metadata += "Requires-Dist: torch>=2.13\n"
    for name in manifest.project()["optional-dependencies"]:
        metadata += f"Provides-Extra: {name}\n"
        metadata += f'Requires-Dist: torch-reprise[demo]; extra == "{name}"\n'
    info = f"torch_reprise-{VERSION}.dist-info"
    texts = {f"torch_reprise/{name}": "" for name in check_wheel.NEEDED}
    texts["torch_reprise/_build_info.py"] = INFO.format(
        version=VERSION, torch=torch, build_type=build_type
    )
    texts["torch_reprise/_C.cpython-311-x86_64-linux-gnu.so"] = "ELF"
    texts[f"{info}/METADATA"] = metadata
    texts[f"{info}/licenses/LICENSE"] = "BSD"
    return {name: text.encode() for name, text in texts.items()}


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / f"torch_reprise-{VERSION}-cp311-cp311-linux_x86_64.whl"
    record = f"torch_reprise-{VERSION}.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, record: _record(files, record)}.items():
            archive.writestr(name, data)
    return path


def read_wheel(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def problems(path: Path, files: dict[str, bytes]) -> list[str]:
    return check_wheel.content_problems(path, files) + check_wheel.metadata_problems(path, files)


# --- the label


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("2.13.0+cpu", "torch2.13.0.cpu"),
        ("2.14.1+cu130", "torch2.14.1.cu130"),
        ("2.14.1", "torch2.14.1"),
        ("2.15.0.dev20261101+cpu", "torch2.15.0.dev20261101.cpu"),
        ("2.14.0a0+git1234abc", "torch2.14.0a0.git1234abc"),
    ],
)
def test_a_label_is_a_local_version_as_tools_write_it(torch: str, expected: str) -> None:
    assert label(torch) == expected
    assert str(Version(f"{VERSION}+{expected}")) == f"{VERSION}+{expected}"


@pytest.mark.parametrize(
    ("torch", "distribution"), [("2.13.0+cpu", "2.13.0+cpu"), ("2.14.1+cu130", "2.14.1")]
)
def test_a_labelled_wheel_says_one_thing_everywhere(
    torch: str, distribution: str, tmp_path: Path
) -> None:
    before = files_of(torch)
    path = label_wheel(write_wheel(tmp_path, before), tmp_path / "dist", distribution)
    files = read_wheel(path)
    assert problems(path, files) == []
    name, version, _, _ = parse_wheel_filename(path.name)
    assert (name, str(version)) == ("torch-reprise", f"{VERSION}+{label(torch)}")
    metadata = files[f"torch_reprise-{version}.dist-info/METADATA"].decode()
    assert f"\nVersion: {version}\n" in metadata
    assert f"\nRequires-Dist: torch=={distribution}\n" in metadata
    # The extras of ours are not torch.
    extras = len(manifest.project()["optional-dependencies"])
    assert metadata.count("Requires-Dist: torch-reprise[demo]") == extras
    info = build_info(files["torch_reprise/_build_info.py"].decode())
    assert info["version"] == str(version)
    assert info["torch_version"] == torch
    # All else is as it was.
    same = [name for name in before if ".dist-info/" not in name and "_build_info" not in name]
    assert len(same) >= 5
    assert {name: files[name] for name in same} == {name: before[name] for name in same}


def test_a_wheel_is_labelled_once(tmp_path: Path) -> None:
    path = label_wheel(write_wheel(tmp_path, files_of()), tmp_path / "dist", "2.13.0+cpu")
    with pytest.raises(SystemExit, match="has a label already"):
        label_wheel(path, tmp_path / "again", "2.13.0+cpu")


def test_a_wheel_that_requires_no_torch_is_not_labelled(tmp_path: Path) -> None:
    files = files_of()
    name = f"torch_reprise-{VERSION}.dist-info/METADATA"
    files[name] = files[name].replace(b"Requires-Dist: torch>=2.13\n", b"")
    with pytest.raises(SystemExit, match="METADATA: 0 lines match"):
        label_wheel(write_wheel(tmp_path, files), tmp_path / "dist", "2.13.0+cpu")


# --- what is wrong with a wheel


def labelled(folder: Path, **changes: str) -> tuple[Path, dict[str, bytes]]:
    path = label_wheel(write_wheel(folder, files_of(**changes)), folder / "dist", "2.13.0+cpu")
    return path, read_wheel(path)


@pytest.mark.parametrize(
    "name",
    [
        "torch_reprise/segment.cpp",
        "tests/test_rng.py",
        "torch_reprise/libreprise_core.a",
        "torch_reprise/__pycache__/rng.cpython-311.pyc",
    ],
)
def test_a_file_that_does_not_belong_is_found(name: str, tmp_path: Path) -> None:
    path, files = labelled(tmp_path)
    found = check_wheel.content_problems(path, {**files, name: b""})
    assert found == [f"does not belong: {name}", "RECORD does not agree with the files"]


@pytest.mark.parametrize("name", ["py.typed", "_C.pyi", "_build_info.py"])
def test_a_file_that_is_missing_is_found(name: str, tmp_path: Path) -> None:
    path, files = labelled(tmp_path)
    del files[f"torch_reprise/{name}"]
    assert f"missing: {name}" in check_wheel.content_problems(path, files)


def test_a_module_for_another_python_is_found(tmp_path: Path) -> None:
    path, files = labelled(tmp_path)
    data = files.pop("torch_reprise/_C.cpython-311-x86_64-linux-gnu.so")
    files["torch_reprise/_C.cpython-312-x86_64-linux-gnu.so"] = data
    (first, _) = check_wheel.content_problems(path, files)
    assert first.startswith("expected one extension module, _C for cpython-311, found")


def test_changed_contents_do_not_agree_with_record(tmp_path: Path) -> None:
    path, files = labelled(tmp_path)
    files["torch_reprise/__init__.py"] += b"x"
    assert check_wheel.content_problems(path, files) == ["RECORD does not agree with the files"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (f"Version: {VERSION}+torch2.13.0.cpu", "Version: 9.9", "the version in METADATA is 9.9"),
        ("torch==2.13.0+cpu", "torch>=2.13", "built with torch 2.13.0+cpu, requires"),
        ("torch==2.13.0+cpu", "torch==2.14.1", "built with torch 2.13.0+cpu, requires"),
        ("Name: torch-reprise", "Name: reprise", "the name is reprise"),
        ("Provides-Extra: demo\n", "", "the extras are"),
    ],
)
def test_metadata_that_disagrees_is_found(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    path, files = labelled(tmp_path)
    (name,) = (name for name in files if name.endswith("METADATA"))
    assert old in files[name].decode()
    files[name] = files[name].decode().replace(old, new).encode()
    (found,) = check_wheel.metadata_problems(path, files)
    assert found.startswith(complaint)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("2.13.0+cpu", "2.14.1+cpu", "the version in the file name is"),
        ('"cp311"', '"cp312"', "built for cp312, the tag is cp311"),
        ("Release", "Debug", "a Debug build"),
    ],
)
def test_a_build_that_is_another_one_is_found(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    path, files = labelled(tmp_path)
    name = "torch_reprise/_build_info.py"
    files[name] = files[name].decode().replace(old, new).encode()
    assert any(line.startswith(complaint) for line in check_wheel.metadata_problems(path, files))


def test_the_extension_of_this_build_needs_what_a_wheel_may_need() -> None:
    from torch_reprise import _C

    library = Path(_C.__file__)
    assert check_wheel.library_problems(library) == []
    assert check_wheel.library_problems(library, ["torch_cpu.so"]) == [
        "the extension names torch_cpu.so"
    ]
    assert Version(check_wheel.oldest_libraries(library)["GLIBC"]) >= Version("2.2.5")


def test_only_what_the_manifest_lists_is_built() -> None:
    assert build_wheels.wanted(None) == manifest.torches()
    first = manifest.torches()[0]
    assert build_wheels.wanted(first.release) == [first]
    with pytest.raises(SystemExit, match=r"no torch 1\.0 in packaging/versions\.toml; there are"):
        build_wheels.wanted("1.0")
