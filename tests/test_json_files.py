"""JSON that is not what it should be: each reader says so in a sentence."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tpipe_jax
from tpipe_jax import json_files
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.settings import Config
from tpipe_jax.errors import UserError
from tpipe_jax.interop.convert import ADAPTERS
from tpipe_jax.interop.hugging_face import read_model
from tpipe_jax.json_files import MAX_DEPTH, parse_json, read_json
from tpipe_jax.planning.latency_file import load_table
from tpipe_jax.planning.plan import Plan, PlanRequest, load_plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.simulate import simulate
from tpipe_jax.reporting import loss_plot
from tpipe_jax.reporting.loss_plot import draw_losses, read_metrics
from tpipe_jax.reporting.metrics import Metrics
from tpipe_jax.reporting.trace_file import read_timeline, read_trace, trace_events
from tpipe_jax.reporting.workdir import changed_settings

DEEP = 100_000 * "["
BAD = {
    "deep": (DEEP, "nested more than 100 deep"),
    "closed": (DEEP + 100_000 * "]", "nested more than 100 deep"),
    "objects": ('{"a":' * 5000 + "1" + "}" * 5000, "nested more than 100 deep"),
    "text": ("not JSON", r"it is no JSON, expecting value at line 1, column 1"),
    "digits": ("1" * 5000, "it has a number of thousands of digits"),
    "bytes": (b'{"a": "\xff"}', "its byte 7 is not UTF-8"),
    "twice": ('[{"a": 1, "b": 2, "a": 3}]', "it gives a twice in an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_json_is_a_value_error(name: str, tmp_path: Path):
    text, what = BAD[name]
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "a.json").write_bytes(content)
    for read in (lambda: parse_json(text), lambda: read_json(tmp_path / "a.json")):
        with pytest.raises(ValueError, match=what) as error:
            read()
        assert type(error.value) is ValueError
        assert len(str(error.value)) < 200


def test_depth_is_counted_and_not_brackets():
    wide = [[n] for n in range(1000)]
    assert parse_json(json.dumps(wide)) == wide
    assert parse_json(json.dumps("[" * 1000)) == "[" * 1000
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(f"[1, {deepest[1:-1]}]")
    for text in (f"[{deepest}]", f'{{"a": {deepest}}}', f"[[1], {deepest}]"):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            parse_json(text)


def test_a_text_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_files, "MAX_BYTES", 2**20)
    (tmp_path / "a.json").write_text(json.dumps("a" * (2**20 - 2)))
    assert len(read_json(tmp_path / "a.json")) == 2**20 - 2
    (tmp_path / "a.json").write_text(json.dumps("a" * 2**20))
    for path in (tmp_path / "a.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match="it has more than 1 MiB"):
            read_json(path)


def test_a_short_text_of_many_values(monkeypatch: pytest.MonkeyPatch):
    """Each empty list takes thirty times the memory of its text."""
    monkeypatch.setattr(json_files, "MAX_VALUES", 2**20)
    for value in ("[]", "{}", "0", '""'):
        assert len(parse_json("[" + f"{value}," * 2**18 + "0]")) == 2**18 + 1
        with pytest.raises(ValueError, match="it has more than 1 million values"):
            parse_json("[" + f"{value}," * 2**20 + "0]")


def test_a_name_given_twice_among_many_is_found_soon():
    members = "".join(f'"{n}": 0, ' for n in range(300_000))
    with pytest.raises(ValueError, match="it gives 299999 twice"):
        parse_json("{" + members + '"299999": 1}')


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"step": true}', "a line has no step"),
        ('{"step": 1.0}', "a line has no step"),
        ('{"step": "1"}', "a line has no step"),
        ('{"step": null}', "a line has no step"),
        ('{"step": 1, "loss": true}', "loss is True, no number"),
        ('{"step": 1, "loss": "2"}', "loss is '2', no number"),
        ('{"step": 1, "loss": NaN}', "loss is nan, no number"),
        ('{"step": 1, "loss": 1e400}', "loss is inf, no number"),
        ('{"step": 1, "eval_loss": [1]}', r"eval_loss is \[1\], no number"),
        ('{"step": 1, "learning_rate": -1e308}', "learning_rate is -1e[+]308, no number"),
        ('{"step": 1' + "0" * 4000 + "}", r"step is 10*\.\.\., no number"),
        ('{"step": 1, "x": "' + "y" * 70_000 + '"}', "a line has more than 65536 bytes"),
    ],
)
def test_lines_that_cannot_be_drawn(line: str, what: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n' + line + "\n")
    with pytest.raises(UserError, match=what) as error:
        draw_losses([tmp_path], tmp_path / "loss.png")
    assert len(str(error.value)) < 600


def test_more_lines_than_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_plot, "MAX_LINES", 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n' * 3)
    assert len(read_metrics(tmp_path)) == 3
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n' * 4)
    with pytest.raises(UserError, match="there are more than 3"):
        read_metrics(tmp_path)


def test_names_of_folders_are_no_formulas(tmp_path: Path):
    runs = [tmp_path / name for name in ("a$\\frac{$", "b$x_{$")]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
        draw_losses([run], tmp_path / "loss.png")
    draw_losses(runs, tmp_path / "loss.png")


SCHEDULE = make_schedule(Plan(2, (1,), ((2, 2),)))
EVENTS = trace_events(1, "measured, step 1", SCHEDULE, simulate(SCHEDULE, [1, 1], [1, 1]))


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (0, {"pid": True}),
        (0, {"args": [1]}),
        (0, {"args": {"name": "$\\frac{$", "step_seconds": 6.0}}),
        (0, {"args": {"name": "measured, step 1", "step_seconds": True}}),
        (0, {"args": {"name": "measured, step 1", "step_seconds": 1e308}}),
        (-1, {"tid": True}),
        (-1, {"tid": 5}),
        (-1, {"tid": 0.0}),
        (-1, {"cat": "x"}),
        (-1, {"ts": "1"}),
        (-1, {"ts": 1e300}),
        (-1, {"dur": -1}),
        (-1, {"name": 1}),
        (-1, EVENTS[-2]),
    ],
)
def test_values_of_a_timeline(number: int, changes: dict[str, Any], tmp_path: Path):
    events = [dict(event) for event in EVENTS]
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert read_timeline(read_trace(path, 1), SCHEDULE)
    events[number] |= changes
    path.write_text(json.dumps({"traceEvents": events}))
    assert read_timeline(read_trace(path, 1), SCHEDULE) is None


def test_the_mark_in_front_of_utf_8_is_no_part_of_it(tmp_path: Path):
    (tmp_path / "a.json").write_bytes('\ufeff{"ä": 1}'.encode())
    assert read_json(tmp_path / "a.json") == {"ä": 1}


def in_folder(read: Callable[[Path], object], name: str) -> Callable[[Path, bytes], object]:
    """Writes the content under this name, and reads the folder."""

    def write_and_read(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        return read(folder)

    return write_and_read


READERS = {
    "plan": in_folder(lambda f: load_plan(f / "plan.json", PlanRequest(2, 1, 4)), "plan.json"),
    "latency": in_folder(lambda f: load_table(f / "latency.json"), "latency.json"),
    "config": in_folder(lambda f: load_config(f / "config.json"), "config.json"),
    "workdir": in_folder(lambda f: changed_settings(Config(), f), "config.json"),
    "plot": in_folder(read_metrics, "metrics.jsonl"),
    "metrics": in_folder(lambda f: Metrics(f, 1), "metrics.jsonl"),
    "import": in_folder(lambda f: read_model(f, ADAPTERS), "config.json"),
}


@pytest.mark.parametrize("content", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_says_so_in_a_sentence(reader: str, content: str, tmp_path: Path):
    text = BAD[content][0]
    with pytest.raises(UserError) as error:
        READERS[reader](tmp_path, (text if isinstance(text, bytes) else text.encode()) + b"\n")
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "content", [*(text for text, _ in BAD.values()), '{"traceEvents": [{"pid": 1, "ph": "X"}]}']
)
def test_a_timeline_that_is_none_is_drawn_anew(content: str | bytes, tmp_path: Path):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_trace(tmp_path / "a.json", 1) == []


def test_files_are_read_through_this_module_alone():
    """What the processes of a run send each other is no file."""
    between_processes = {
        "checkpoint/checkpoints.py",
        "profiling/measured_plan.py",
        "reporting/measured_ticks.py",
        "reporting/stragglers.py",
        "runtime/failures.py",
        "runtime/processes.py",
    }
    package = Path(tpipe_jax.__file__).parent
    reads = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.loads", "json.load")
    }
    data = {name for name in reads if name.startswith("data/")}
    assert reads - data == between_processes | {"json_files.py"}


@pytest.mark.parametrize("step", ["true", "1.0", '"1"', "null", "[]"])
def test_a_run_goes_on_only_after_steps_that_are_whole_numbers(step: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    with pytest.raises(UserError, match="has lines that are no metrics of a run"):
        Metrics(tmp_path, 1)
