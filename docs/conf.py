"""How Sphinx makes the site of docs/: ``make docs``, which writes build/docs.

The pages are Markdown that also reads well where the repository is shown: links between them, and
out of docs/ into the repository, are relative paths. Nothing of the package is imported; the
reference is written by make_api.py, and tests/test_docs.py says if it is out of date. The built
site loads nothing from a network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _version() -> str:
    found = re.search(
        r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE
    )
    if found is None:
        raise SystemExit("pyproject.toml has no version")
    return found[1]


project = "torch-reprise"
author = "torch-reprise authors"
release = version = _version()

extensions = ["myst_parser"]
myst_heading_anchors = 3  # as repository hosts make them, so that links with # work in both places
# Without a linkifier a bare address stays text; addresses are written as links.
myst_enable_extensions: list[str] = []
nitpicky = True
highlight_language = "text"  # of a block that names none
exclude_patterns = ["pictures"]

html_theme = "furo"
html_title = f"torch-reprise {release}"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
pygments_style = "friendly"
pygments_dark_style = "monokai"

# Files of the repository that are pages of the site as well.
_PAGES_OF_FILES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}


def links_to_pages(text: str) -> str:
    """Links into the repository lead to the page of the site where there is one.

    What there is none for is named instead: on the site there is nothing behind it.
    """

    def replaced(link: re.Match[str]) -> str:
        words, path, anchor = link[1], link[2], link[3] or ""
        page = _PAGES_OF_FILES.get(path)
        if page is not None:
            return f"[{words}]({page}{anchor})"
        is_name = path.endswith(words.strip("`"))
        return f"`{path}`" if is_name else f"{words} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)", replaced, text)


def _on_source_read(app: Any, page: str, source: list[str]) -> None:
    source[0] = links_to_pages(source[0])


def _on_include_read(app: Any, path: Any, page: str, source: list[str]) -> None:
    """An included file's links are relative to where it lies: seen from docs/, with ``../``."""
    folder = (ROOT / "docs" / path).resolve().parent

    def from_docs(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve().relative_to(ROOT).as_posix()
        inside = target.removeprefix("docs/")
        return f"{link[1]}({inside if inside != target else '../' + target}{link[3] or ''})"

    text = re.sub(r"(\[[^\]]+\])\((?!\w+:|#)([^)#]+)(#[^)]*)?\)", from_docs, source[0])
    source[0] = links_to_pages(text)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _on_source_read)
    app.connect("include-read", _on_include_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
