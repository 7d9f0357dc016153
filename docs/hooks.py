"""Shows the source files in the site, and links to them; mkdocs calls this file (see mkdocs.yml).

The site gets a page for each file of `SOURCES`, with its highlighted text, and a page for each file
of `DOCUMENTS`. Inline code that names such a file becomes a link to its page: `planning/slicer.py`
and `tpipe_jax/planning/slicer.py` are the same file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests come without mkdocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("tpipe_jax", "launch", "configs", "examples", "bench", "tests", "docs")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml"}
DOCUMENTS = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
PREFIXES = ("", "tpipe_jax/", "tests/")  # folders that the name of a file may leave out
SUFFIXES = "|".join(suffix[1:] for suffix in (*LANGUAGES, ".md"))
UNITS = re.compile(r"(?<=\d) (?=(?:s|ms|MB|GB|GiB|min)\b)")
NAMES = re.compile(rf"(?<!\[)`(?:python )?([\w/]+\.(?:{SUFFIXES}))(?: [^`\n]*)?`")


def pages() -> dict[str, str]:
    """The page of each file, by the file's path in the repository."""
    found = dict(DOCUMENTS)
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in LANGUAGES:
                found[name] = f"source/{name.replace('.', '_')}.md"
            elif folder == "docs" and path.suffix == ".md":
                found[name] = path.name
    return found


def page_of(name: str, known: dict[str, str]) -> str | None:
    """The page of a file as a text names it, or None if there is no such file."""
    return next((known[p + name] for p in PREFIXES if p + name in known), None)


def with_links(text: str, page: str, known: dict[str, str]) -> str:
    """The text of a page with a link at each inline code that names a file."""

    def link(match: re.Match[str]) -> str:
        target = page_of(match[1], known)
        if target is None or target == page:
            return match[0]
        return f"[{match[0]}]({posixpath.relpath(target, posixpath.dirname(page))})"

    return NAMES.sub(link, text)


def source_page(name: str) -> str:
    """The page that shows a source file; the search leaves it out."""
    path = ROOT / name
    code = f'`````{LANGUAGES[path.suffix]} linenums="1"\n{path.read_text()}`````\n'
    about = f"title: {name}\nhide: [navigation, toc]\nsearch: {{exclude: true}}\n"
    return f"---\n{about}---\n\n# {name}\n\n{code}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of files that lie outside docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    for name, page in pages().items():
        if name in DOCUMENTS:
            # Their links begin at the root of the repository.
            text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text())
            files.append(File.generated(config, page, content=text))
        elif page.startswith("source/"):
            shown = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, page, content=source_page(name), inclusion=shown))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns inline code that names a file into a link, and keeps numbers of tables beside their
    unit.
    """
    if page.file.src_uri.startswith("source/"):
        return markdown
    lines = with_links(markdown, page.file.src_uri, pages()).split("\n")
    return "\n".join(UNITS.sub("\N{NO-BREAK SPACE}", n) if n[:1] == "|" else n for n in lines)
