"""The picture of the ways to divide devices."""

from pathlib import Path

from matplotlib.figure import Figure

from support.pictures import check_readable, shown
from tpipe_jax.reporting.meshes_plot import Point, draw_meshes


def test_what_fits_has_a_colour_of_its_own(tmp_path: Path, figures: list[Figure]):
    points = [
        Point("1 x 8 x 1", 0.5, 20.0),
        Point("8 x 1 x 1", 0.7, 90.0),
        Point("2 x 4 x 1", 1, 5),
    ]
    draw_meshes(tmp_path, points, 60.0)
    check_readable(figures[0], tmp_path / "meshes.png")
    [axes] = figures[0].axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn["fits"] == [(20.0, 0.5), (5, 1)]
    assert drawn["does not fit"] == [(90.0, 0.7)]
    assert list(dict.fromkeys(axes.lines[2].get_xdata())) == [60.0]
    for point in points:
        assert point.name in shown(figures[0])


def test_without_a_limit_all_fit(tmp_path: Path, figures: list[Figure]):
    draw_meshes(tmp_path, [Point("1 x 8 x 1", 0.5, 2000.0)], None)
    [axes] = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["fits"]
