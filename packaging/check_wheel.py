"""Checks a labelled wheel without installing it.

    python packaging/check_wheel.py dist/torch_reprise-*.whl

- nothing but the package: no sources, no tests, nothing that a build leaves behind;
- py.typed, a stub for each compiled or generated module, the license;
- RECORD agrees with every file;
- name, version, requirement, Python and platform tag agree with what CMake wrote down about the
  build, so that pip, the handshake and ``python -m torch_reprise info`` cannot tell different
  things;
- the extension needs torch's libraries by name, looks for them beside the installed torch and
  nowhere else, and has no path of the machine that built it.

`main` also prints the oldest C and C++ libraries that the wheel runs with. The tag is
``linux_<machine>``: a ``manylinux`` one promises an old C library, and the build would have to be
made on one.
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

from label_wheel import _record, build_info, label
from manifest import project

PACKAGE = "torch_reprise"
NEEDED = (
    *("__init__.py", "__main__.py", "_C.pyi", "_build_info.py", "_build_info.pyi", "py.typed"),
    # The page of a report is made of these.
    *(
        f"_report/{name}"
        for name in ("page.html", "page.css", "charts.js", "report.js", "table.js")
    ),
)
ALLOWED_SUFFIXES = (".py", ".pyi", ".so", ".typed")
# By these names the loader finds what torch has loaded, and the C and C++ run-time libraries.
LIBRARIES = re.compile(
    r"lib(c10|torch_cpu|torch_python|cudart|stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so(\.\d+)*"
    r"|ld-linux[-\w]*\.so(\.\d+)*"
)


def _dist_info(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def content_problems(wheel: Path, files: dict[str, bytes]) -> list[str]:
    info = _dist_info(wheel)
    found = [f"missing: {name}" for name in NEEDED if f"{PACKAGE}/{name}" not in files]
    for name in files:
        if name.startswith(f"{info}/"):
            continue
        inside = name.removeprefix(f"{PACKAGE}/")
        if inside == name or not (inside in NEEDED or name.endswith(ALLOWED_SUFFIXES)):
            found.append(f"does not belong: {name}")
    libraries = [name for name in files if name.endswith(".so")]
    tag = wheel.name.split("-")[2].replace("cp", "cpython-")
    if len(libraries) != 1 or not libraries[0].startswith(f"{PACKAGE}/_C.{tag}-"):
        found.append(f"expected one extension module, _C for {tag}, found {libraries}")
    if f"{info}/licenses/LICENSE" not in files:
        found.append("missing: LICENSE")
    record = files.get(f"{info}/RECORD", b"").decode()
    others = {name: data for name, data in files.items() if name != f"{info}/RECORD"}
    rows = sorted(csv.reader(io.StringIO(record)))
    if rows != sorted(csv.reader(io.StringIO(_record(others, f"{info}/RECORD").decode()))):
        found.append("RECORD does not agree with the files")
    return found


def metadata_problems(wheel: Path, files: dict[str, bytes]) -> list[str]:
    """Where the name, the metadata and the build information disagree."""
    info = _dist_info(wheel)
    name, version, python, _, platform = wheel.name.removesuffix(".whl").split("-")
    metadata = HeaderParser().parsestr(files[f"{info}/METADATA"].decode())
    built = build_info(files[f"{PACKAGE}/_build_info.py"].decode())
    torch = str(built["torch_version"])
    expected = f"{project()['version']}+{label(torch)}"
    found = [
        f"{what} is {value}, expected {expected}"
        for what, value in (
            ("the version in the file name", version),
            ("the version in METADATA", metadata["Version"]),
            ("torch_reprise.__version__", built["version"]),
        )
        if value != expected
    ]
    if name != PACKAGE or metadata["Name"] != project()["name"]:
        found.append(f"the name is {metadata['Name']} in {wheel.name}")
    requires = [
        line for line in metadata.get_all("Requires-Dist", []) if re.match(r"torch(?![\w.-])", line)
    ]
    if requires not in ([f"torch=={torch}"], [f"torch=={torch.partition('+')[0]}"]):
        found.append(f"built with torch {torch}, requires {requires}")
    if python != built["python_tag"]:
        found.append(f"built for {built['python_tag']}, the tag is {python}")
    if not platform.startswith("linux_"):
        found.append(f"the platform is {platform}")
    if built["build_type"] != "Release":
        found.append(f"a {built['build_type']} build")
    offered = set(metadata.get_all("Provides-Extra", []))
    if offered != set(project()["optional-dependencies"]):
        found.append(f"the extras are {sorted(offered)}")
    return found


def _readelf(library: Path, *options: str) -> str:
    command = ["readelf", "--wide", *options, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def library_problems(library: Path, forbidden: Sequence[str] = ()) -> list[str]:
    """What is wrong with the extension; `forbidden` are paths of this machine."""
    dynamic = _readelf(library, "--dynamic")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    found = [f"the extension needs {name}" for name in needed if not LIBRARIES.fullmatch(name)]
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch_python.so"):
        if name not in needed:
            found.append(f"the extension does not need {name}")
    paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)
    if paths != ["$ORIGIN/../torch/lib"]:
        found.append(f"the extension looks for libraries in {paths}")
    content = library.read_bytes()
    found += [f"the extension names {path}" for path in forbidden if path.encode() in content]
    return found


def oldest_libraries(library: Path) -> dict[str, str]:
    """The newest versions of GLIBC and GLIBCXX that the extension asks for."""
    text = _readelf(library, "--version-info")
    newest = {}
    for name in ("GLIBC", "GLIBCXX"):
        versions = [v.split(".") for v in re.findall(rf"Name: {name}_([\d.]+)", text)]
        newest[name] = ".".join(max(versions, key=lambda v: [int(part) for part in v]))
    return newest


def check(wheel: Path, forbidden: Sequence[str] = ()) -> dict[str, str]:
    """SystemExit with everything that is wrong; returns :func:`oldest_libraries`."""
    with zipfile.ZipFile(wheel) as archive:
        files = {m.filename: archive.read(m) for m in archive.infolist() if not m.is_dir()}
    found = content_problems(wheel, files)
    if not found:  # the others look into what has to be there
        found = metadata_problems(wheel, files)
        (module,) = (name for name in files if name.endswith(".so"))
        with tempfile.TemporaryDirectory() as scratch:
            library = Path(scratch, "_C.so")
            library.write_bytes(files[module])
            found += library_problems(library, forbidden)
            oldest = oldest_libraries(library)
    if found:
        raise SystemExit("\n".join([f"{wheel.name}:", *found]))
    return oldest


def main(arguments: Sequence[str]) -> int:
    for name in arguments:
        wheel = Path(name)
        oldest = check(wheel)
        runs_with = ", ".join(f"{library} {version}" for library, version in oldest.items())
        print(f"{wheel.name}: fine; needs {runs_with}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
