"""JSON that is not what it should be: each reader says so in a sentence."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import tpipe_jax
from tpipe_jax import json_files
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.settings import Config
from tpipe_jax.errors import UserError
from tpipe_jax.interop import gpt2
from tpipe_jax.json_files import MAX_DEPTH, parse_json, read_json
from tpipe_jax.planning.latency_file import load_table
from tpipe_jax.planning.plan import PlanRequest, load_plan
from tpipe_jax.reporting.loss_plot import read_metrics
from tpipe_jax.reporting.metrics import Metrics
from tpipe_jax.reporting.trace_file import read_trace
from tpipe_jax.reporting.workdir import changed_settings

DEEP = 100_000 * "["
BAD = {
    "deep": (DEEP, "nested more than 100 deep"),
    "closed": (DEEP + 100_000 * "]", "nested more than 100 deep"),
    "objects": ('{"a":' * 5000 + "1" + "}" * 5000, "nested more than 100 deep"),
    "text": ("not JSON", r"it is no JSON, expecting value at line 1, column 1"),
    "digits": ("1" * 5000, "it has a number of thousands of digits"),
    "bytes": (b'{"a": "\xff"}', "its byte 7 is not UTF-8"),
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
    "import": in_folder(gpt2.read_model, "config.json"),
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
