"""The architecture: which folder of the package may import which."""

import ast
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import tpipe_jax

PACKAGE = Path(tpipe_jax.__file__).parent
EVERYWHERE = {"errors", "files", "json_files", "version"}

# Each folder may import itself, EVERYWHERE, and these.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "json_files": set(),
    "version": set(),
    "config": set(),
    "planning": {"config"},
    "data": {"config"},
    "devices": {"config"},
    "runtime": {"config"},
    "attention": {"devices", "planning", "config"},
    "checkpoint": {"runtime", "planning", "config"},
    "model": {"attention", "devices", "config"},
    "pipeline": {"model", "attention", "devices", "planning", "config"},
    "reporting": {"runtime", "model", "devices", "planning", "config"},
}
ALLOWED["training"] = {"pipeline", "reporting", "checkpoint", "data"}.union(
    *(ALLOWED[folder] for folder in ("pipeline", "reporting", "checkpoint", "data"))
)
ALLOWED["interop"] = {
    "training",
    "checkpoint",
    "data",
    "reporting",
    "pipeline",
    "model",
    "devices",
    "config",
}
ALLOWED["profiling"] = {"training"} | ALLOWED["training"]
ALLOWED["commands"] = ALLOWED.keys() - {"commands"}
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["api"] = set(ALLOWED) - {"api", "cli"}
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = {"api", "model"}  # the public names, when they are first asked for

# These and all that they import are plain Python, so that a mistake is answered at once and plans
# can be made where jax is not.
WITHOUT_JAX = (
    "errors",
    "files",
    "json_files",
    "config",
    "config.command_line",
    "planning",
    *(f"planning.{path.stem}" for path in sorted((PACKAGE / "planning").glob("[!_]*.py"))),
    "cli.main",
    *(f"cli.{name}" for name in ("train", "plan", "plot", "tokenize", "checkpoints", "doctor")),
    "reporting.console",
    "reporting.loss_plot",
    "reporting.plan_report",
    "runtime.environment",
    "runtime.exits",
    "runtime.jax_options",
    "runtime.launcher",
    "runtime.outputs",
    "runtime.schedulers",
    "commands.launch",
    "checkpoint.manifest",
)


def modules() -> dict[str, Path]:
    """All modules by their names below the package, as `planning.slicer`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, module below the package and name of each import of our own, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "tpipe_jax", "import names from it instead"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the whole name"
            package, _, module = (node.module or "").partition(".")
            if package == "tpipe_jax":
                yield from ((node.lineno, module, alias.name) for alias in node.names)


def violations(name: str, path: Path) -> Iterator[str]:
    folder = name.split(".")[0]
    known = modules()
    for line, module, imported in imports(path):
        target = (module or imported).split(".")[0]
        where = f"tpipe_jax/{name.replace('.', '/')}.py:{line}"
        if target not in ALLOWED[folder] | EVERYWHERE | {folder}:
            yield f"{where} imports {target}, which {folder} may not"
        if imported.startswith("_") and imported != "__version__":
            yield f"{where} imports {imported}, which is private to {module}"
        if module not in known and f"{module}.__init__" in known:
            is_face = imported in (PACKAGE / module / "__init__.py").read_text()
            is_module = f"{module}.{imported}" in known
            if is_face and not is_module:
                yield (
                    f"{where} imports {imported} from {module}, which is for users: name its module"
                )


@pytest.mark.parametrize("name", modules())
def test_imports_only_what_its_folder_may(name: str):
    assert not list(violations(name, modules()[name]))


def test_every_folder_says_what_it_is():
    folders = {path.parent for path in modules().values()} - {PACKAGE}
    assert {folder.name for folder in folders} == {
        name for name in ALLOWED if (PACKAGE / name).is_dir()
    }
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_folders_are_on_levels():
    """So there are no circles: each imports only folders that are on a lower level."""
    left, order = dict(ALLOWED), []
    while left:
        free = [name for name, allowed in left.items() if not allowed & left.keys()]
        assert free, f"there is a circle among {sorted(left)}"
        order += free
        for name in free:
            del left[name]
    assert set(order[-2:]) == {"__main__", "__init__"}


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_imports_without_jax(name: str):
    program = (
        f"import sys, importlib; importlib.import_module('tpipe_jax.{name}'); "
        "sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_forbidden_import_is_named(tmp_path: Path):
    path = tmp_path / "planner.py"
    path.write_text(
        "def late():\n    from tpipe_jax.devices import mesh\nfrom tpipe_jax.planning import Plan\n"
        "from tpipe_jax.planning.slicer import _search, Slicing\n"
    )
    where = "tpipe_jax/planning/planner.py"
    assert set(violations("planning.planner", path)) == {
        f"{where}:2 imports devices, which planning may not",
        f"{where}:3 imports Plan from planning, which is for users: name its module",
        f"{where}:4 imports _search, which is private to planning.slicer",
    }


def test_the_picture_of_the_folders_is_as_the_code():
    """`python docs/folders.py` draws it anew."""
    docs = runpy.run_path(str(PACKAGE.parent / "docs" / "folders.py"))
    with Image.open(docs["PICTURE"]) as picture:
        assert json.loads(picture.info["Description"]) == json.loads(json.dumps(docs["content"]()))
