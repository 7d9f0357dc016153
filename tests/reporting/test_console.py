"""What the terminal shows of a plan."""

import io
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.text import Text

from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.devices.mesh import HostPart
from tpipe_jax.planning.plan import Plan, Prediction
from tpipe_jax.planning.planner import Alternative, Option, Planning
from tpipe_jax.reporting.console import Console, count, milliseconds
from tpipe_jax.reporting.terminal import TimeLeft

# Four batch slices, of which two are alike; 14 ms and 28 ms of work on each of 2 stages.
FORWARD = ((0.001, 0.002), (0.001, 0.002), (0.003,), (0.005,))
BACKWARD = tuple(tuple(2 * t for t in times) for times in FORWARD)
PREDICTION = Prediction(
    step_seconds=0.052 + 0.005 + 0.010 - 0.010,
    outside_seconds=0.010,
    slice_forward_seconds=FORWARD,
    slice_backward_seconds=BACKWARD,
    slice_transfer_seconds=((0.0, 0.0), (0.0, 0.0), (0.0,), (0.0,)),
    is_optimal=True,
    lower_bound_seconds=0.05,
)
PLAN = Plan(2, (2, 2, 1, 3), ((5, 3), (5, 3), (8,), (8,)), PREDICTION)


def test_plan_has_a_line_for_each_different_slice(capsys: pytest.CaptureFixture[str]):
    Console().show_plan(PLAN, [1.0, 1.0])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:6] == [
        ["2", "x", "2", "1", "x", "5", "0", "1", "2"],
        ["1", "x", "3", "5", "2", "4"],
        ["1", "x", "1", "1", "x", "8", "0", "3", "6"],
        ["1", "x", "3", "1", "x", "8", "0", "5", "10"],
    ]
    # 42 ms of work, and the longest slice, 5 and 10 ms, once more: stages wait 15 of 57 ms.
    assert " ".join(lines[6]).endswith("of which 10 ms outside of the pipeline; bubble 26%")


def test_plan_without_prediction_has_no_times(capsys: pytest.CaptureFixture[str]):
    Console().show_plan(Plan(2, (2,), ((5, 3),)), [1.0, 1.0])
    out = capsys.readouterr().out
    assert "tokens" in out
    assert "forward" not in out
    assert "predicted" not in out


def test_planning_is_compared_with_plainer_plans(capsys: pytest.CaptureFixture[str]):
    unsliced, uniform = Alternative(1, 1, 0.114), Alternative(4, 2, 0.0627)
    Console().show_planning(
        Planning(PLAN, (1.0, 1.0), (), unsliced, uniform, 7, 0.5, PLAN, PLAN, 0.0)
    )
    out = capsys.readouterr().out
    assert "no plan is faster under these latencies: proven, 7 programmes solved in 0.50 s" in out
    assert "unsliced would take 114 ms, +100.0%: 1 batch slice of 1 token slice" in out
    assert "would take 62.7 ms, +10.0%: 4 batch slices of 2 token slices" in out


def test_a_plan_without_proof_tells_its_bound(capsys: pytest.CaptureFixture[str]):
    plan = replace(PLAN, prediction=replace(PREDICTION, is_optimal=False))
    Console().show_planning(Planning(plan, (1.0, 1.0), (), None, None, 7, 0.5, plan, plan, 0.0))
    out = capsys.readouterr().out
    assert "no plan is faster than 50 ms under these latencies" in out
    assert "proven" not in out
    assert "would take" not in out


def test_a_faster_plan_that_is_not_taken_is_named(capsys: pytest.CaptureFixture[str]):
    fastest = replace(
        PLAN,
        token_slices=((5, 4, 3, 4), *PLAN.token_slices[1:]),
        prediction=replace(PREDICTION, step_seconds=0.0565),
    )
    Console().show_planning(Planning(PLAN, (1.0, 1.0), (), None, None, 7, 0.5, fastest, PLAN, 0.02))
    out = " ".join(capsys.readouterr().out.split())
    assert "the fastest plan" in out
    assert "would take 56.5 ms, -0.9%" in out
    assert "within the error of the latencies, 2%" in out


def test_agreement(capsys: pytest.CaptureFixture[str]):
    Console().show_agreement(0.090, 0.100)
    assert capsys.readouterr().out == "a step takes 100 ms, predicted were 90 ms: -10%\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.2345, "1234 ms"), (0.0123456, "12.3 ms"), (1e-5, "0.01 ms")]
)
def test_milliseconds(seconds: float, text: str):
    assert milliseconds(seconds) == text


def test_hosts_have_a_line_each(capsys: pytest.CaptureFixture[str]):
    parts = [
        HostPart("first", [0, 1, 2, 5], 8, [0], [0, 1]),
        HostPart("second", [3], 8, [1, 2, 4, 5], [0]),
    ]
    Console().show_hosts(parts)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, *_ in lines] == ["hosts", "host", "first", "second"]
    assert " ".join(lines[2][1].split()) == "0-2, 5 8 0 0-1"
    assert " ".join(lines[3][1].split()) == "3 8 1-2, 4-5 0"


def option(schedule: ScheduleName, seconds: float, num_bytes: float | None, fits: bool) -> Option:
    prediction = replace(PREDICTION, step_seconds=seconds)
    plan = replace(PLAN, schedule=schedule, prediction=prediction)
    return Option(plan, 0.25, num_bytes, fits)


@pytest.mark.parametrize(
    ("names", "others", "reason"),
    [
        (("1f1b", "terapipe"), (0.1, 9e6, True), "taken: the fastest"),
        (("terapipe", "1f1b"), (0.0499, 9e6, True), "taken: as fast, stages wait less"),
        (("1f1b", "interleaved"), (0.0501, 9e6, True), "taken: the fastest"),
        (("1f1b", "terapipe"), (0.01, None, False), "taken: the only one that fits"),
    ],
)
def test_schedules_are_compared(
    names: tuple[ScheduleName, ScheduleName],
    others: tuple[float, float | None, bool],
    reason: str,
    capsys: pytest.CaptureFixture[str],
):
    taken, other = option(names[0], 0.05, 3e6, True), option(names[1], *others)
    options = (other, taken)
    planning = Planning(
        taken.plan, (1.0, 1.0), options, None, None, 7, 0.5, taken.plan, taken.plan, 0.0
    )
    Console().show_planning(planning)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    [of_other] = [line for line in lines if line.startswith(names[1])]
    [of_taken] = [line for line in lines if line.startswith(names[0])]
    assert of_taken.split()[:6] == [names[0], "50", "ms", "25%", "3.0", "MB"]
    assert of_taken.endswith(reason)
    assert of_other.split("25%")[1].split() == (
        ["9.0", "MB"] if others[2] else ["unknown", "does", "not", "fit"]
    )


def test_a_simpler_plan_has_its_own_time(capsys: pytest.CaptureFixture[str]):
    """The table has the fastest plan under each schedule, and that is another one."""
    taken, other = option("terapipe", 0.05, 3e6, True), option("1f1b", 0.2, 3e6, True)
    simpler = option("terapipe", 0.051, 3e6, True).plan
    planning = Planning(
        simpler, (1.0, 1.0), (taken, other), None, None, 7, 0.5, taken.plan, simpler, 0.05
    )
    Console().show_planning(planning)
    [line] = [own for own in capsys.readouterr().out.splitlines() if own.startswith("terapipe ")]
    assert line.split()[1:3] == ["50", "ms"]
    assert line.endswith("taken, in simpler slices: 51 ms")


def test_slices_of_one_length_share_a_line(capsys: pytest.CaptureFixture[str]):
    times = ((0.0012, 0.00134, 0.15, 0.0007),)
    prediction = replace(PREDICTION, slice_forward_seconds=times, slice_backward_seconds=times)
    prediction = replace(prediction, slice_transfer_seconds=((0.0,) * 4,))
    Console().show_plan(Plan(2, (1,), ((64, 64, 64, 8),), prediction), [1.0, 1.0])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["3", "x", "64", "0-128", "1.2-150", "1.2-150"]
    assert lines[3] == ["1", "x", "8", "192", "0.7", "0.7"]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Console]:
    """Makes a console on a terminal of 45 columns."""
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "45", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)

    def make() -> Console:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return Console()

    return make


def shown(text: str) -> list[str]:
    """The lines, without colours and without movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")


METRICS = {"loss": 2.5544, "tokens_per_second": 10599.0, "step_seconds": 0.0968}


def test_nothing_falls_off_a_narrow_terminal(
    narrow: Callable[[], Console], capsys: pytest.CaptureFixture[str]
):
    console = narrow()
    with console.progress(12300, 100000):
        console.show_progress(12310, METRICS)
        time.sleep(0.02)  # the time that is left is shown from the second update on
        console.show_progress(12320, METRICS | {"eval_loss": 2.7})
    bars = [line for line in shown(capsys.readouterr().out) if "12320/100000" in line]
    assert bars
    for line in bars:
        assert len(line.rstrip()) <= 45
        assert "loss 2.554" in line
        assert "…" not in line
    console.show_plan(PLAN, [1.0, 1.0])
    console.show_facts({"model": "a sentence of more than forty-five characters in this line"})
    lines = shown(capsys.readouterr().out)
    assert max(len(line.rstrip()) for line in lines if "predicted" not in line) <= 45
    assert not any("…" in line for line in lines)


def test_words_stay_whole_and_commands_can_be_copied(
    narrow: Callable[[], Console], capsys: pytest.CaptureFixture[str]
):
    console = narrow()
    console.say("a step takes 195 ms, predicted were 214 ms: this is more")
    console.say("    tpipe train --workdir=runs/mine --config.train.num-steps=600")
    assert [line.rstrip() for line in shown(capsys.readouterr().out)] == [
        "a step takes 195 ms, predicted were 214 ms:",
        "this is more",
        "    tpipe train --workdir=runs/mine --config.train.num-steps=600",
        "",
    ]


def test_lines_stay_above_the_bar(
    narrow: Callable[[], Console], capsys: pytest.CaptureFixture[str]
):
    console = narrow()
    with console.progress(0, 20):
        console.show_progress(10, METRICS | {"eval_loss": 2.75})
    out = capsys.readouterr().out
    assert "step 10: held-out loss 2.750 nats per token\n" in out
    assert not shown(out)[-1].strip()  # the bar is gone in the end


def test_time_says_that_it_is_left(monkeypatch: pytest.MonkeyPatch):
    task = SimpleNamespace(finished=False, time_remaining=65.0)
    assert TimeLeft().render(task) == Text("1:05 left")  # pyrefly: ignore
    task.time_remaining = 3725
    assert TimeLeft().render(task) == Text("1:02:05 left")  # pyrefly: ignore
    task.time_remaining = None
    assert TimeLeft().render(task) == Text("")  # pyrefly: ignore


def test_a_pipe_gets_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    console = Console()
    with console.progress(0, 20):
        console.show_progress(10, METRICS)
    with console.profiling() as move:
        move(1, 2)
    console.show_facts({"a": "b", "longer": "c " * 60})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step 10: loss 2.554  10,599 tokens/s  97 ms/step", "profiling ..."]
    assert lines[2:] == ["a       b", "longer  " + "c " * 59 + "c"]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_bar_fills_a_pipe(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Also where colours are asked for."""
    monkeypatch.setenv(name, "1")
    console = Console()
    with console.progress(0, 20):
        console.show_progress(10, METRICS)
        time.sleep(0.6)  # a bar is drawn twice a second
    console.show_facts({"a": "b"})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step 10: loss 2.554  10,599 tokens/s  97 ms/step", "a  b"]


MARKUP = "a[:x:2] runs/a:100:b [red]c[/red] :smile: [link=x]"


def test_texts_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    console = Console()
    console.say(MARKUP)
    console.show_facts({MARKUP: MARKUP})
    console.show_table(MARKUP, [MARKUP], [[MARKUP]])
    console.show_commands("next", {"look": MARKUP})
    console.show_sample(MARKUP, MARKUP)
    out = capsys.readouterr().out
    assert out.count(MARKUP) == 9
    assert "a held-out text ...\n" in out


def test_a_bar_has_its_texts_as_they_are(
    narrow: Callable[[], Console],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COLUMNS", "200")
    with narrow().working("a[:x:2] :smile:") as move:
        move(1, 2)
    assert "a[:x:2] :smile:" in "".join(shown(capsys.readouterr().out))


def test_what_the_output_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "ascii", errors="strict"))
    Console().say("b\xe4 \u2192 \udcff")
    Console().show_facts({"\xe4": "\u2192"})
    sys.stdout.flush()
    assert output.getvalue() == b"b\\xe4 \\u2192 \\udcff\n\\xe4  \\u2192\n"


def test_the_comparison_is_one_line(capsys: pytest.CaptureFixture[str]):
    Console().show_comparison(2, 0.0981, 0.1733)
    Console().show_comparison(12, 0.0981, 0.1733)
    for line, stages in zip(capsys.readouterr().out.splitlines(), ("two", "12"), strict=True):
        assert line == (
            f"token slices: 98.1 ms a step; whole sequences on the same {stages} stages: 173 ms; "
            "1.8 times as fast"
        )


def test_commands_are_below_each_other(capsys: pytest.CaptureFixture[str]):
    Console().show_commands("what next:", {"look": "at this", "look again": "at that"})
    assert capsys.readouterr().out.splitlines() == [
        "what next:",
        "    look              at this",
        "    look again        at that",
    ]


def test_counts():
    assert [count(n, "layer") for n in (0, 1, 2, 3000)] == [
        "0 layers",
        "1 layer",
        "2 layers",
        "3,000 layers",
    ]


class Unread(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_goes_away_does_not_end_a_program_that_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdout", Unread())
    console = Console()
    console.say("one")
    console.say("two")
    assert capsys.readouterr().err.count("nobody reads the output any more") == 1
