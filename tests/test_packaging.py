"""What is published says one thing everywhere, and the checks of packaging/ find what they are for.

The wheels themselves take minutes: `make wheels` builds and tests them.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "packaging"))

import check_sdist  # noqa: E402
import manifest  # noqa: E402

FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
VERSION = manifest.project()["version"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- versions and dates


def changelog() -> list[tuple[str, str, str]]:
    """Version, date and text of each part of the changelog; Unreleased has no date."""
    parts = re.split(r"^## ", text_of("CHANGELOG.md"), flags=re.MULTILINE)[1:]
    found = []
    for part in parts:
        title, _, text = part.partition("\n")
        match = re.fullmatch(r"\[(.+?)\](?: - (\d{4}-\d\d-\d\d))?", title)
        assert match, f"not a heading of Keep a Changelog: ## {title}"
        found.append((match[1], match[2] or "", text))
    return found


def test_the_version_is_the_same_everywhere() -> None:
    released = [(version, date) for version, date, _ in changelog() if version != "Unreleased"]
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert released[0][0] == VERSION
    assert citation["version"] == VERSION
    assert citation["date-released"] == datetime.date.fromisoformat(released[0][1])


def test_the_changelog_keeps_its_form() -> None:
    parts = changelog()
    assert parts[0][0] == "Unreleased"
    released = parts[1:]
    assert released == sorted(released, key=lambda part: Version(part[0]), reverse=True)
    dates = [datetime.date.fromisoformat(date) for _, date, _ in released]
    assert dates == sorted(dates, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for version, _, text in parts:
        sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
        assert {section.partition("\n")[0] for section in sections} <= kinds, version
        assert all(re.search(r"^- \S", section, re.MULTILINE) for section in sections), version


def test_the_manifest_names_what_the_makefile_pins() -> None:
    makefile = dict(re.findall(r"^(TORCH\w*)\s*\?=\s*(\d\S*)$", text_of("Makefile"), re.MULTILINE))
    assert {torch.makefile: torch.release for torch in manifest.torches()} == makefile
    (minimum,) = (
        Requirement(line)
        for line in manifest.project()["dependencies"]
        if Requirement(line).name == "torch"
    )
    for torch_ in manifest.torches():
        assert torch_.release in minimum.specifier


# --- extras and pins


def extra(name: str) -> dict[str, Requirement]:
    """What an extra installs, extras of ours resolved."""
    found = {}
    for line in manifest.project()["optional-dependencies"][name]:
        requirement = Requirement(line)
        if manifest.canonical(requirement.name) == manifest.project()["name"]:
            for inner in requirement.extras:
                found.update(extra(inner))
        else:
            found[manifest.canonical(requirement.name)] = requirement
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda p: p.stem
)
def test_an_extra_names_what_its_requirements_pin(path: Path) -> None:
    pins = manifest.pinned(path)
    pins.pop("pip", None)  # installs the others
    wanted = extra(path.stem)
    assert set(pins) == set(wanted)
    for name, lines in pins.items():
        for line in lines:
            (specifier,) = Requirement(line).specifier
            assert specifier.operator == "==", line
            assert specifier.version in wanted[name].specifier, line


def test_the_tools_for_wheels_are_pinned() -> None:
    for kind in ("build", "test"):
        assert manifest.tools(kind)
        assert all("==" in line for line in manifest.tools(kind))


# --- files


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_the_host_of_a_package_registry(tracked: list[Path]) -> None:
    # Backwards, so that this file is not one of those that it looks for.
    backwards = ("gro.ipyp", "gro.detsohnohtyp", "gro.sjmpn", "moc.sjmpn", "oi.setarc")
    backwards += ("gro.adnocana", "gro.hcrotyp.daolnwod", "gro.naibed")
    pattern = re.compile("|".join(re.escape(host[::-1]) for host in backwards))
    assert pattern.search("https://" + "gro.detsohnohtyp.selif"[::-1] + "/simple")
    assert len(tracked) > 100
    found = [
        path.relative_to(ROOT)
        for path in tracked
        if pattern.search(path.read_bytes().decode("utf-8", "replace"))
    ]
    assert found == []


def test_the_package_is_typed() -> None:
    package = ROOT / "python" / "torch_reprise"
    assert (package / "py.typed").read_bytes() == b""
    # What has no Python source in the repository: the extension, and what CMake writes.
    assert {path.stem for path in package.glob("*.pyi")} == {"_C", "_build_info"}


def test_the_citation_has_what_its_schema_asks_for() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == manifest.project()["license"]
    assert [author["name"] for author in citation["authors"]] == ["torch-reprise authors"]
    assert [author["name"] for author in manifest.project()["authors"]] == ["torch-reprise authors"]
    known = {"cff-version", "message", "title", "authors"}  # required
    assert known <= set(citation)
    optional = {"type", "abstract", "version", "date-released", "license", "keywords"}
    assert set(citation) <= known | optional


# --- issue forms


def form(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FORMS / f"{name}.yml").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", ["bug", "wrong_gradient", "feature"])
def test_an_issue_form_is_one(name: str) -> None:
    loaded = form(name)
    assert all(isinstance(loaded[key], str) for key in ("name", "description", "title"))
    ids = [part["id"] for part in loaded["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    for part in loaded["body"]:
        assert part["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert set(part) <= {"type", "id", "attributes", "validations"}
        assert part["attributes"]["value" if part["type"] == "markdown" else "label"]
        if part["type"] in {"dropdown", "checkboxes"}:
            assert len(part["attributes"]["options"]) >= 1


def test_every_issue_goes_through_a_form() -> None:
    assert {path.stem for path in FORMS.iterdir()} == {"bug", "wrong_gradient", "feature", "config"}
    assert form("config") == {"blank_issues_enabled": False}


@pytest.mark.parametrize("name", ["bug", "wrong_gradient"])
def test_a_report_asks_for_the_environment(name: str) -> None:
    (part,) = (part for part in form(name)["body"] if part.get("id") == "environment")
    assert "python -m torch_reprise info" in part["attributes"]["description"]
    assert part["validations"]["required"] is True


def test_the_program_in_the_form_for_wrong_gradients_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (part,) = (part for part in form("wrong_gradient")["body"] if part.get("id") == "program")
    exec(compile(part["attributes"]["value"], "form", "exec"), {})
    assert capsys.readouterr().out == "[True, True, True, True]\n"


def test_the_options_named_in_the_form_exist() -> None:
    from torch_reprise import Checkpointer

    (part,) = (part for part in form("wrong_gradient")["body"] if part.get("id") == "checks")
    call = re.search(r"`(Checkpointer\(.+?\))`", part["attributes"]["description"])
    assert call
    x = torch.randn(3, requires_grad=True)
    checked = eval(call[1], {"Checkpointer": Checkpointer})
    checked(torch.tanh, x).sum().backward()
    found, x.grad = x.grad, None
    torch.tanh(x).sum().backward()
    assert found is not None and x.grad is not None and torch.equal(found, x.grad)


# --- the sdist


def needed() -> set[str]:
    return {*check_sdist.NEEDED_FILES, "csrc/host.cpp", "python/torch_reprise/py.typed"}


@pytest.mark.parametrize(
    ("more", "less", "complaint"),
    [
        ("", "", ""),
        ("", "csrc/host.cpp", "missing: csrc/host.cpp"),
        ("", "LICENSE", "missing: LICENSE"),
        ("build/torch/objects.o", "", "not in git: build/torch/objects.o"),
        (".ci/run", "", "does not belong: .ci/run"),
    ],
)
def test_what_an_sdist_lacks_or_has_too_much(more: str, less: str, complaint: str) -> None:
    tracked = needed() | {".ci/run"}
    names = (needed() | {"PKG-INFO", more}) - {less, ""}
    assert check_sdist.problems(names, tracked, set()) == ([complaint] if complaint else [])


def test_a_file_that_is_not_added_yet_may_be_in_an_sdist() -> None:
    names = needed() | {"csrc/new.cpp"}
    assert check_sdist.problems(names, needed(), {"csrc/new.cpp"}) == []


def test_a_file_that_no_one_has_is_missing() -> None:
    without = needed() - {"LICENSE"}
    assert check_sdist.problems(without, without, set()) == ["missing: LICENSE"]


@pytest.fixture
def sdist(tmp_path: Path) -> Iterator[Any]:
    """Makes an sdist of these files."""
    import io
    import tarfile

    def make(files: dict[str, str]) -> Path:
        path = tmp_path / "thing-1.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(f"thing-1/{name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        return path

    yield make


def test_unpacking_touches_only_what_changed(sdist: Any, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    check_sdist.unpack_changed(sdist({"same": "1", "changed": "1", "sub/gone": "1"}), folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert set(before) == {"same", "changed", "gone"}
    check_sdist.unpack_changed(sdist({"same": "1", "changed": "2"}), folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert set(after) == {"same", "changed"}
    assert after["same"] == before["same"]
    assert after["changed"] > before["changed"]
    assert (folder / "changed").read_text() == "2"


def test_an_sdist_that_leaves_its_folder_is_refused(sdist: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="outside of thing-1/"):
        check_sdist.unpack_changed(sdist({"../../elsewhere": ""}), tmp_path / "unpacked")
