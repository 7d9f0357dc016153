"""The picture of the losses: what is in it, for one run and for several."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tpipe_jax.cli.main import run
from tpipe_jax.errors import UserError
from tpipe_jax.reporting.loss_plot import draw_losses, read_metrics, smoothed


def a_run(workdir: Path, *lines: dict[str, Any]) -> Path:
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


LINES: list[dict[str, Any]] = [
    {"step": 10 * n, "loss": 3 - 0.1 * n, "learning_rate": 1e-3 / n} for n in range(1, 11)
]
LINES[4]["eval_loss"], LINES[9]["eval_loss"], LINES[6]["loss"] = 2.75, 2.25, None


def test_one_run(tmp_path: Path, figures: list[Figure]):
    workdir = a_run(tmp_path / "run", *LINES)
    draw_losses([workdir], workdir / "loss.png")
    with Image.open(workdir / "loss.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    losses, rates = figures[0].axes
    raw, smooth, held_out = losses.lines
    steps = [10, 20, 30, 40, 50, 60, 80, 90, 100]  # a loss that was not finite is left out
    assert list(raw.get_xdata()) == steps
    np.testing.assert_allclose(raw.get_ydata(), [3 - step / 100 for step in steps])
    assert list(smooth.get_xdata()) == steps
    assert list(zip(held_out.get_xdata(), held_out.get_ydata(), strict=True)) == [
        (50, 2.75),
        (100, 2.25),
    ]
    assert held_out.get_label() == "held out, 2.250 at the end"
    assert list(rates.lines[0].get_ydata()) == [1e-3 / n for n in range(1, 11)]
    assert losses.get_ylabel() == "loss [nats per token]"
    assert (rates.get_xlabel(), rates.get_ylabel()) == ("step", "learning rate")


def test_several_runs_have_names_and_colours(tmp_path: Path, figures: list[Figure]):
    runs = [a_run(tmp_path / name, *LINES) for name in ("a/one", "b/one", "two")]
    draw_losses(runs, tmp_path / "all.png")
    lines = figures[0].axes[0].lines
    labels = [line.get_label() for line in lines if "smoothed" in str(line.get_label())]
    names = [str(runs[0]), str(runs[1]), "two"]
    assert labels == [f"{name}: training, smoothed" for name in names]
    assert [line.get_color() for line in lines[::3]] == ["C0", "C1", "C2"]


def test_the_mean_is_not_drawn_to_zero():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3, 3, 3])
    late = smoothed([3.0] * 50 + [2.0])
    assert late[-1] == pytest.approx(3 - 0.2, abs=0.01)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    workdir, other = a_run(tmp_path / "run", *LINES), a_run(tmp_path / "other", *LINES)
    assert run("plot", [str(workdir)]) == 0
    assert capsys.readouterr().out == f"the picture is {workdir / 'loss.png'}\n"
    assert run("plot", [str(workdir), str(other), f"--out={tmp_path / 'both.png'}"]) == 0
    assert (tmp_path / "both.png").exists()
    assert run("plot", []) == 2
    assert "name the workdir of a run" in capsys.readouterr().err
    assert run("plot", [str(workdir), f"--out={tmp_path / 'missing' / 'a.png'}"]) == 2
    assert "cannot write to --out=" in capsys.readouterr().err
    assert run("plot", [str(workdir), f"--out={tmp_path / 'a.xyz'}"]) == 2
    assert "ends in .xyz: use .png, .svg or .pdf" in capsys.readouterr().err
    assert run("plot", [str(workdir), f"--out={tmp_path / 'a.svg'}"]) == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()
    plan = tmp_path / "plan"
    plan.mkdir()
    assert run("plot", [str(workdir), str(plan), f"--out={tmp_path / 'one.png'}"]) == 0
    assert f"{plan} is left out" in capsys.readouterr().out
    assert {path.name for path in workdir.iterdir()} == {"metrics.jsonl", "loss.png"}


def test_a_torn_line_is_left_out(tmp_path: Path):
    workdir = a_run(tmp_path / "run", *LINES)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "lo')
    assert [line["step"] for line in read_metrics(workdir)] == list(range(10, 101, 10))


def test_lines_have_all_that_a_run_has_logged(tmp_path: Path):
    line = {"step": 1, "loss": 2.0, "grad_norm": 0.5, "tokens_per_second": 7.0}
    workdir = a_run(tmp_path / "run", line)
    assert read_metrics(workdir) == [line]
    assert read_metrics(workdir, ["step", "loss"]) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "has no metrics.jsonl to read"),
        ("", "has logged no step yet"),
        ("no json\n", "has lines that are no metrics"),
        ('{"loss": 3}\n', "has lines that are no metrics"),
        ("3\n", "has lines that are no metrics"),
    ],
)
def test_what_is_no_run_is_refused(text: str | None, sentence: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=sentence):
        draw_losses([tmp_path], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
