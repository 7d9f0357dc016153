"""The pages of docs/ against the code: settings, error messages, files, names and commands."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from support import runs

DOCS = runs.ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def module(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(DOCS / name)))


def test_the_tables_of_settings_are_as_the_code():
    """`python docs/settings.py` writes them anew."""
    script = module("settings.py")
    page = script.PAGE.read_text()
    assert script.renewed(page) == page
    assert re.search(
        r"\| `train.batch_size` \| whole number \| `8` \| at least 1 \| Sequences of a step", page
    )


def test_the_tables_of_settings_need_no_jax():
    program = (
        "import runpy, sys; sys.modules['jax'] = None; "
        f"runpy.run_path({str(DOCS / 'settings.py')!r})['tables']()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_each_setting_has_a_line_with_its_meaning():
    page = (DOCS / "settings.md").read_text()
    rows = re.findall(r"^\| `(\w+\.\w+)` \| ([^|]+) \| `([^`]+)` \|.*\| (.+) \|$", page, re.M)
    names = {name for name, *_ in rows}
    assert {"checkpoint.async", "model.block", "optim.learning_rate"} <= names
    assert all(kind and meaning.endswith(".") for _, kind, _, meaning in rows)


@cache
def messages() -> list[str]:
    """The texts in the code; a value that is filled in is an …"""
    paths = [
        path for folder in ("tpipe_jax", "launch") for path in runs.ROOT.glob(f"{folder}/**/*.py")
    ]
    return [text for path in paths for text in texts(ast.parse(path.read_text()))]


def texts(tree: ast.AST) -> list[str]:
    """The texts of a module, without its docstrings."""
    nodes = list(ast.walk(tree))
    about = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    found = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in about
    ]
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = (
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
            found.append("".join(parts))
    return found


def is_in_code(quoted: str) -> bool:
    return any(quoted in message for message in messages())


def quoted_errors() -> list[str]:
    return re.findall(r"^### `(.+)`$", (DOCS / "errors.md").read_text(), re.M)


def test_quoted_errors_are_literally_in_the_code():
    quoted = quoted_errors()
    assert len(quoted) > 30
    assert [text for text in quoted if not is_in_code(text)] == []
    assert not is_in_code("config.train.batch_size=… is no multiple")


def test_inline_code_that_names_a_file_becomes_a_link():
    hooks = module("hooks.py")
    known = hooks.pages()
    text = "see `planning/slicer.py`, `python bench/gpu.py --quick` and [`docs/data.md`](x)"
    assert hooks.with_links(text, "design.md", known) == (
        "see [`planning/slicer.py`](source/tpipe_jax/planning/slicer_py.md), "
        "[`python bench/gpu.py --quick`](source/bench/gpu_py.md) and [`docs/data.md`](x)"
    )
    assert hooks.with_links("`no/file.py`", "design.md", known) == "`no/file.py`"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_files_that_a_page_names_exist(path: Path):
    """Or are of the user's own."""
    hooks = module("hooks.py")
    known, own = hooks.pages(), {"my_config.py", "launch/NAME.py"}
    names = [match[1] for match in hooks.NAMES.finditer(path.read_text())]
    assert [n for n in names if hooks.page_of(n, known) is None and n not in own] == []


def navigation(entries: list[Any]) -> list[str]:
    """The pages in mkdocs.yml."""
    values = [value for entry in entries for value in entry.values()]
    return [n for v in values for n in (navigation(v) if isinstance(v, list) else [v])]


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((runs.ROOT / "mkdocs.yml").read_text())
    assert [list(group) for group in settings["nav"]] == [
        ["Start"],
        ["Guides"],
        ["Reference"],
        ["Design"],
    ]
    from_elsewhere = set(module("hooks.py").DOCUMENTS.values())
    assert set(navigation(settings["nav"])) == {path.name for path in PAGES} | from_elsewhere


def settings_named() -> set[str]:
    page = (DOCS / "settings.md").read_text()
    return set(re.findall(r"^\| `(\w+\.\w+)` \|", page, re.M))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_settings_that_a_page_names_exist(path: Path):
    text = path.read_text()
    named = re.findall(r"\bconfig\.([a-z]+\.[a-z][a-z0-9_-]*)(?![\w.])", text)
    fields = {name.replace("-", "_").rstrip("_") for name in named}
    sections = {name.split(".")[0] for name in settings_named()}
    asked = {name for name in fields if name.split(".")[0] in sections}
    assert asked - settings_named() == set()


def test_the_table_of_folders_names_all_of_them():
    rows = re.findall(r"^\| `(\w+)/` \|", (DOCS / "design.md").read_text(), re.M)
    folders = {path.parent.name for path in (runs.ROOT / "tpipe_jax").glob("*/__init__.py")}
    assert sorted(rows) == sorted(folders)


def commands(page: Path) -> list[str]:
    """The lines of code blocks that begin with `tpipe`."""
    text = page.read_text().replace("\\\n", " ")
    return [line.strip() for line in re.findall(r"^    (tpipe .+)$", text, re.M)]


def test_flags_in_commands_exist():
    """The settings are tested above; these are the other flags of each command."""
    known: dict[str, set[str]] = {}
    for page in PAGES:
        for line in commands(page):
            name, *words = shlex.split(line, comments=True)[1:]
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            asked = {flag for flag in flags if not flag.startswith("--config")}
            if asked - known.setdefault(name, set()):
                known[name] |= help_flags(name, words[0] if name == "convert" else "")
                for form in {"--latency", "--gpu"} & flags if name == "plan" else ():
                    known[name] |= help_flags(name, form)
            assert asked <= known[name], line


def help_flags(*words: str) -> set[str]:
    command = [sys.executable, "-m", "tpipe_jax", *filter(None, words), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][a-z0-9.-]*", done.stdout))
