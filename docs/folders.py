"""Draws docs/folders.png: the folders of the package, their modules, and which imports which.

    python docs/folders.py

Everything in it is read from the code. Imports that follow from two others are left out. The
picture's metadata hold what it shows, and a test compares that with the code.
"""

import ast
import json
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[1]
PACKAGE, PICTURE = ROOT / "tpipe_jax", ROOT / "docs" / "folders.png"
WIDTH, GAP, LINE = 3.3, 0.35, 0.17  # of a box, between boxes, of a line of text, in inches
COLUMNS = 45  # letters in a line of a box
PAPER = ("planning", "profiling", "attention", "pipeline")  # what the method itself is in


def folders() -> dict[str, Path]:
    """The folders of the package by name; the programs in launch/; api, a module by itself."""
    found = {path.parent.name: path.parent for path in sorted(PACKAGE.glob("*/__init__.py"))}
    return found | {"launch": ROOT / "launch", "api": PACKAGE / "api.py"}


def modules(folder: Path) -> list[Path]:
    """The modules of a folder."""
    return [folder] if folder.suffix else sorted(folder.glob("[!_]*.py"))


def imports() -> dict[str, list[str]]:
    """Which other folders the modules of each folder import."""
    names, found = folders(), {}
    for name, folder in names.items():
        targets = set()
        for path in modules(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "tpipe_jax."
                ):
                    targets.add(str(node.module).split(".")[1])
        found[name] = sorted(targets & names.keys() - {name})
    return found


def levels(edges: dict[str, list[str]]) -> dict[str, int]:
    """How many folders lie one above another below each folder."""
    found: dict[str, int] = {}
    while len(found) < len(edges):
        for name, below in edges.items():
            if name not in found and all(other in found for other in below):
                found[name] = 1 + max((found[other] for other in below), default=-1)
    return found


def direct(edges: dict[str, list[str]]) -> list[tuple[str, str]]:
    """The imports that do not follow from two others."""
    level = levels(edges)

    def below(name: str) -> set[str]:
        return set(edges[name]).union(*map(below, edges[name]))

    return [
        (name, other)
        for name in sorted(edges, key=lambda name: level[name])
        for other in edges[name]
        if not any(other in below(between) for between in edges[name] if between != other)
    ]


def text_of(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """What a folder is, and its modules, as lines."""
    source = folder if folder.suffix else folder / "__init__.py"
    sentence = "The programs that a user starts."
    if source.exists():
        sentence = (ast.get_docstring(ast.parse(source.read_text())) or "").split("\n\n")[0]
    if folder.suffix:
        return textwrap.wrap(sentence, COLUMNS), []
    names = ", ".join(path.stem for path in modules(folder))
    return textwrap.wrap(" ".join(sentence.split()), COLUMNS), textwrap.wrap(names, COLUMNS)


def content() -> dict[str, Any]:
    """What the picture shows."""
    texts = {name: text_of(name, folder) for name, folder in folders().items()}
    return {"imports": imports(), "texts": texts}


def draw() -> None:
    """Writes the picture."""
    shown, known = content(), folders()
    edges, texts = shown["imports"], shown["texts"]
    level = levels(edges)
    height = {name: LINE * (2.2 + len(a) + len(b)) for name, (a, b) in texts.items()}
    rows = [[n for n in known if level[n] == i] for i in range(max(level.values()) + 1)]
    across = max(len(row) for row in rows) * (WIDTH + GAP) - GAP
    place, y = {}, 0.0
    for row in rows:
        left = (across - len(row) * (WIDTH + GAP) + GAP) / 2
        for i, name in enumerate(row):
            place[name] = left + i * (WIDTH + GAP), y
        y += max(height[name] for name in row) + 0.55
    figure = Figure(figsize=(across + 0.4, y + 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.2, across + 0.2), ylim=(-0.2, y))
    axes.axis("off")
    for name, other in direct(edges):
        (x, bottom), (x_other, y_other) = place[name], place[other]
        axes.add_patch(
            FancyArrowPatch(
                (x + WIDTH / 2, bottom),
                (x_other + WIDTH / 2, y_other + height[other]),
                arrowstyle="-|>",
                mutation_scale=11,
                color="#8a8f98",
                lw=1,
                shrinkA=0,
                shrinkB=0,
                zorder=1,
            )
        )
    for name, (sentence, names) in texts.items():
        (x, bottom), top = place[name], place[name][1] + height[name]
        style = "round,pad=0,rounding_size=0.08"
        box = FancyBboxPatch((x, bottom), WIDTH, height[name], boxstyle=style, zorder=2)
        colour = "#fdf1dc" if name in PAPER else "#f4f6fb"
        box.set(facecolor=colour, edgecolor="#3b4a6b", lw=1)
        axes.add_patch(box)
        title = name + ("" if known[name].suffix else "/")
        at = {"va": "top", "ha": "left", "zorder": 3}
        axes.text(x + 0.1, top - 0.08, title, fontsize=11, fontweight="bold", **at)
        line = top - 0.08 - 1.5 * LINE
        for text, colour in [(t, "#333333") for t in sentence] + [(t, "#3b4a6b") for t in names]:
            axes.text(x + 0.1, line, text, fontsize=8, color=colour, **at)
            line -= LINE
    figure.savefig(PICTURE, dpi=110, metadata={"Description": json.dumps(shown)})


if __name__ == "__main__":
    draw()
