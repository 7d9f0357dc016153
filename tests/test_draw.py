"""The pictures of the benchmarks, drawn from the results that are kept."""

import importlib
import runpy
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from support.pictures import check_readable
from support.several_processes import ROOT

SOURCES = {"paper": "computed", "emulated": "emulated", "pipeline": "measured"}
SOURCES |= {"torch_peer": "measured", "timeline": "computed"}


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figure]) -> dict:
    """What `python bench/draw.py` draws, by its name, without a place in docs/."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    results, picture = map(importlib.import_module, ("results", "picture"))
    monkeypatch.setattr(results, "DOCS", tmp_path)
    monkeypatch.setattr(picture, "PATH", tmp_path / "timeline.png")
    paths: list[Path] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **kw: paths.append(path) or save(self, path, **kw)
    )
    runpy.run_path(str(ROOT / "bench" / "draw.py"), run_name="__main__")
    return {path.stem: (path, figure) for path, figure in zip(paths, figures, strict=True)}


def test_pictures_can_be_read_and_say_where_their_numbers_are_from(drawn: dict):
    assert sorted(drawn) == sorted(SOURCES)
    for name, (path, figure) in drawn.items():
        check_readable(figure, path)
        titles = [axes.get_title() for axes in figure.axes] + [figure.get_suptitle()]
        assert any(SOURCES[name] in title for title in titles), name
        assert (ROOT / "docs" / path.name).exists()


def test_bars_have_their_values(drawn: dict):
    for name in ("paper", "emulated", "pipeline", "torch_peer"):
        axes = drawn[name][1].axes[0]
        values = [value for bars in axes.containers for value in bars.datavalues]
        labels = [float(text.get_text()) for text in axes.texts]
        assert labels == pytest.approx(values, abs=0.5 if name == "pipeline" else 0.005)
        assert len(values) >= 15


def test_bars_are_those_of_their_series(drawn: dict):
    """Setting 9, and one sequence of 1024 tokens, as the tables of docs/results.md have them."""
    expected = {
        "paper": (8, [6.75, 7.91]),
        "emulated": (2, [10.17, 10.85, 1.29, 1.38]),
        "pipeline": (1, [50, 50, 94, 79]),
        "torch_peer": (0, [2.04, 1.43, 1.14]),
    }
    series = {
        "paper": ["measured by the paper, on V100s", "computed here"],
        "emulated": [
            "whole sequences, computed",
            "whole sequences, emulated",
            "token slices, computed",
            "token slices, emulated",
        ],
        "pipeline": [
            "whole sequences, computed bound",
            "whole sequences, measured",
            "token slices, computed bound",
            "token slices, measured",
        ],
        "torch_peer": [
            "torch.distributed.pipelining",
            "tpipe_jax",
            "products and attention alone, without waiting",
        ],
    }
    for name, (group, values) in expected.items():
        bars = drawn[name][1].axes[0].containers
        assert [each.get_label() for each in bars] == series[name]
        found = [each.datavalues[group] for each in bars]
        assert found == pytest.approx(values, abs=0.5 if name == "pipeline" else 0.006)
