"""Names a wheel after the torch that it was built with, and makes it require that torch.

    python packaging/label_wheel.py WHEEL FOLDER --torch-distribution 2.13.0+cpu

The extension fits one build of torch. So the wheel's version gets a local label,
``0.1.0+torch2.13.0.cpu``, and its metadata ``torch==2.13.0+cpu`` in the place of ``torch>=2.13``:
pip refuses it beside another torch, two wheels never have one name, and
``torch_reprise.__version__``, ``python -m torch_reprise info`` and ``pip list`` say the same. The
label is made of what CMake wrote down in ``_build_info.py``, which is what the import handshake
compares: both say the whole ``torch.__version__``. The requirement is on the version that torch's
own metadata has, which may lack the local part (``2.14.1`` for a ``2.14.1+cu130``); the handshake
tells those apart.

Done on the finished wheel, not before the build: a local label in pyproject.toml would also be one
of the sdist, and an sdist fits every torch.
"""

from __future__ import annotations

import argparse
import ast
import base64
import csv
import hashlib
import io
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

_TORCH_REQUIREMENT = re.compile(r"^Requires-Dist: torch(?=[^A-Za-z0-9._-]).*$", re.MULTILINE)
_VERSION = re.compile(r"^Version: (?P<version>\S+)$", re.MULTILINE)
_INFO_VERSION = re.compile(r'^    version="(?P<version>[^"]+)",$', re.MULTILINE)


def label(torch_version: str) -> str:
    """The local part for a wheel: ``"torch2.13.0.cpu"`` for torch ``"2.13.0+cpu"``."""
    return "torch" + re.sub(r"[^a-z0-9]+", ".", torch_version.lower()).strip(".")


def build_info(source: str) -> dict[str, str | None]:
    """The fields of a ``_build_info.py``, read without importing it."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            return {
                str(keyword.arg): ast.literal_eval(keyword.value)
                for keyword in statement.value.keywords
            }
    raise SystemExit("_build_info.py has no INFO = BuildInfo(...)")


def _replaced(pattern: re.Pattern[str], new: str, text: str, what: str) -> str:
    text, count = pattern.subn(lambda _: new, text)
    if count != 1:
        raise SystemExit(f"{what}: {count} lines match {pattern.pattern!r}, expected one")
    return text


def _record(files: dict[str, bytes], name: str) -> bytes:
    """RECORD: each file with its digest and size, itself without."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
        rows.writerow([path, f"sha256={digest.decode()}", len(content)])
    rows.writerow([name, "", ""])
    return text.getvalue().encode()


def label_wheel(wheel: Path, folder: Path, torch_distribution: str) -> Path:
    """Writes the labelled wheel into `folder`; `torch_distribution` is torch's metadata version."""
    name, version, tags = re.fullmatch(r"([^-]+)-([^-]+)-(.+)\.whl", wheel.name).groups()  # type: ignore[union-attr]
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        contents = {member.filename: archive.read(member) for member in members}
    info_name = f"{name}/_build_info.py"
    info = build_info(contents[info_name].decode())
    if info["version"] != version or "+" in version:
        raise SystemExit(f"{wheel.name} was built as {info['version']}, or has a label already")
    labelled = f"{version}+{label(str(info['torch_version']))}"
    old, new = f"{name}-{version}.dist-info", f"{name}-{labelled}.dist-info"

    metadata = contents[f"{old}/METADATA"].decode()
    metadata = _replaced(_VERSION, f"Version: {labelled}", metadata, "METADATA")
    requirement = f"Requires-Dist: torch=={torch_distribution}"
    metadata = _replaced(_TORCH_REQUIREMENT, requirement, metadata, "METADATA")
    contents[f"{old}/METADATA"] = metadata.encode()
    line = f'    version="{labelled}",'
    text = _replaced(_INFO_VERSION, line, contents[info_name].decode(), info_name)
    contents[info_name] = text.encode()

    del contents[f"{old}/RECORD"]
    contents = {path.replace(f"{old}/", f"{new}/", 1): data for path, data in contents.items()}
    record = _record(contents, f"{new}/RECORD")
    modes = {m.filename.replace(f"{old}/", f"{new}/", 1): m.external_attr for m in members}
    times = {m.filename.replace(f"{old}/", f"{new}/", 1): m.date_time for m in members}
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}-{labelled}-{tags}.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in {**contents, f"{new}/RECORD": record}.items():
            entry = zipfile.ZipInfo(path, times[path])
            entry.external_attr = modes[path]
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Name a wheel after its torch.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch-distribution", required=True, metavar="VERSION")
    options = parser.parse_args(arguments)
    print(label_wheel(options.wheel, options.folder, options.torch_distribution))
    return 0


if __name__ == "__main__":
    sys.exit(main())
