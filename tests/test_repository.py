"""Files that people expect in a repository: that they parse, and agree with the code."""

import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.several_processes import ROOT
from tpipe_jax.version import __version__

GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = [
    *PROJECT["project"]["dependencies"],
    *(each for extra in PROJECT["project"]["optional-dependencies"].values() for each in extra),
]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.lstrip("v").split(".")))


def bounds(package: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The versions of a package that pyproject.toml allows: from, and below."""
    [(low, high)] = [
        found.groups()
        for each in REQUIREMENTS
        if (found := re.fullmatch(rf"{package}>=([\d.]+),<([\d.]+)", each))
    ]
    return version(low), version(high)


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)  # which the format requires
    assert citation["title"] == PROJECT["project"]["name"]
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["abstract"].startswith(PROJECT["project"]["description"])
    [paper] = citation["references"]
    assert paper["url"].endswith("/2102.07988")
    assert paper["authors"][0]["family-names"] == "Li"
    assert paper["url"] in (ROOT / "README.md").read_text()


def test_the_workflow_runs_what_is_run_here():
    workflow = read(GITHUB / "workflows" / "ci.yml")
    triggers = workflow[True]  # `on` is a truth value in YAML 1.1
    assert set(triggers) == {"pull_request", "push"}
    assert triggers["push"] == {"branches": ["main"]}
    assert workflow["permissions"] == {"contents": "read"}
    assert "github.ref" in workflow["concurrency"]["group"]
    [job] = workflow["jobs"].values()
    assert job["timeout-minutes"] == 90
    for step in job["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
    commands = [shlex.split(step["run"]) for step in job["steps"] if "run" in step]
    assert commands == [["taskset", "--cpu-list", "0,1", ".ci/run"]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    [python] = [s["with"]["python-version"] for s in job["steps"] if "setup-python" in str(s)]
    assert PROJECT["project"]["requires-python"] == f">={python}"


def test_hooks_before_a_commit_are_those_of_ci():
    ruff, local = read(ROOT / ".pre-commit-config.yaml")["repos"]
    low, high = bounds("ruff")
    assert ruff["repo"] == "https://github.com/astral-sh/ruff-pre-commit"
    assert low <= version(ruff["rev"]) < high
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    assert local["repo"] == "local"
    [types] = local["hooks"]
    assert {"id", "name", "entry", "language"} <= set(types)  # which a local hook needs
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert types["entry"] in commands
    assert {"ruff check .", "ruff format --check ."} <= set(commands)
    bounds(types["entry"].split()[0])  # installed by an extra


def test_a_bug_report_asks_for_what_doctor_prints():
    form = read(GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml")
    assert {"name", "description", "body"} <= set(form)
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    assert all(element["attributes"]["label"] for element in form["body"] if element in fields)
    ids = [element["id"] for element in fields]
    assert len(set(ids)) == len(ids)
    required = {field["id"] for field in fields if field["validations"]["required"]}
    assert "doctor" in required
    assert read(GITHUB / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": True}


@pytest.mark.parametrize(
    "path",
    ["SECURITY.md", ".github/pull_request_template.md", ".github/ISSUE_TEMPLATE/bug_report.yml"],
)
def test_texts_name_what_there_is(path: str):
    """Files of the repository, and commands of `tpipe`."""
    text = (ROOT / path).read_text()
    for name in re.findall(r"\b(?:docs/\w+\.md|SECURITY\.md|bench/)", text):
        assert (ROOT / name).exists(), name
    for command in re.findall(r"\btpipe ([a-z]+)\b", text):
        assert (ROOT / "tpipe_jax" / "cli" / f"{command}.py").exists(), command


def test_every_folder_is_packaged():
    tools = PROJECT["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "tpipe_jax").rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(tools["packages"]) == names | {"tpipe_jax.configs"}
    assert tools["package-dir"] == {"tpipe_jax.configs": "configs"}
    assert PROJECT["project"]["scripts"] == {"tpipe": "tpipe_jax.cli.main:main"}


def test_types_are_packaged():
    assert (ROOT / "tpipe_jax" / "py.typed").read_bytes() == b""
    tools = PROJECT["tool"]["setuptools"]
    assert "py.typed" in tools["package-data"]["tpipe_jax"]
