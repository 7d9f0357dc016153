"""Settings and files as they may come: a step is trained, or one sentence says what is wrong.

python -m pytest -m "slow or not slow" tests/commands/test_fuzz.py     # a few of each
... -n 0 -s --hypothesis-profile=thorough                              # a thousand and more
"""

import dataclasses
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.numbered_states import MODEL, abstract, state_on
from support.runs import Lines, metrics, small_config
from tpipe_jax.checkpoint.checkpoints import Checkpoints
from tpipe_jax.commands.train import train
from tpipe_jax.config.command_line import parse
from tpipe_jax.config.settings import CheckpointConfig, Config, MeshConfig, to_dict
from tpipe_jax.data.batches import open_data
from tpipe_jax.errors import UserError
from tpipe_jax.planning.latency_file import load_table
from tpipe_jax.planning.plan import Plan, PlanRequest, Prediction, load_plan
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.reporting.console import Console
from tpipe_jax.reporting.metrics import Metrics
from tpipe_jax.reporting.workdir import changed_settings

EXAMPLES = settings.default.max_examples if settings.default else 100
SECONDS = 300  # after which a run hangs

INTS = ["1", "2", "4", "8"], ["0", "-1", "3", "2147483647", "2147483648", "9" * 30, "1e3", "2.5"]
FLOATS = ["0", "0.5", "1", "1e-3"], ["-1", "nan", "inf", "-inf", "1e400", "1e308", "x", ""]
FILES = ["text.txt", "folder", "tokens.npy", "tokens.bin"], ["empty.txt", "none", "garbage.npy", ""]
SLICES = (
    ["uniform:1", "uniform:2", "8", "4,4", "5,2,1", "2"],
    ["uniform:9", "9", "0,8", "-1,9", "²"],
)
WORDS = {  # good and bad ones of single fields, where those of their types don't do
    "mesh.data": (["1", "2"], ["0", "5", "2147483647"]),
    "mesh.pipe": (["1", "2", "3"], ["0", "5", "2147483647"]),
    "mesh.order": (["data,pipe,model", "model,data,pipe"], ["pipe", "", "a,b,c", "data,data,pipe"]),
    "plan.token_slices": SLICES,
    "plan.batch_slices": (
        ["uniform:1", "uniform:2", "2", "1,1"],
        ["uniform:", "uniform:x", "half"],
    ),
    "plan.file": (["plan.json", "None"], ["garbage.npy", "folder", "none", ""]),
    "data.train": FILES,
    "data.eval": ([*FILES[0], "None"], FILES[1]),
    "data.field": (["text", "x", ""], ["y"]),
    "data.end_token": (["None"], ["<|endoftext|>", ""]),
    "data.text_separator": (["None", "<|endoftext|>"], [""]),
    "model.rope_scaling": (["None"], ["x", "", "yarn:4", "linear:0"]),
    "model.block": (["gpt2", "family"], ["x", "", "text.txt:Block", "none.py:Block"]),
    "metrics.wandb": (["None"], ["x"]),
    "data.tokenizer": (["bytes"], ["x", "", "text.txt"]),
    "memory.remat": (["auto", "none", "dots", "full", "attn", "attn,hidden"], ["x", "", "attn,,"]),
    "memory.limit_gib": (["1", "None"], ["0", "1e-9", "nan", "inf", "x"]),
    # More of these only takes longer.
    "train.num_steps": (["1", "2"], ["0", "-1", "x"]),
    "train.eval_batches": (["1", "2"], ["0", "-1", "x"]),
    "train.sample_tokens": (["0", "1"], ["-1", "x"]),
}
BASE = [
    "model.num_layers=2",
    "model.d_model=8",
    "model.num_heads=2",
    "model.seq_len=8",
    "mesh.pipe=1",
    "plan.token_slices=uniform:1",
    "plan.batch_slices=uniform:1",
    "train.num_steps=1",
    "train.batch_size=2",
    "train.eval_batches=1",
    "train.sample_tokens=0",
    "data.train=text.txt",
]
VALUES = [None, True, 0, -1, 1, 2, 2**31, 10**30, 0.5, float("nan"), float("inf"), "", "x", (), {}]


def words_of(hint: Any) -> tuple[list[str], list[str]]:
    """Good and bad words for a field of this type."""
    if get_origin(hint) is Literal:
        return list(get_args(hint)), ["", "x"]
    if type(None) in get_args(hint):
        good, bad = words_of(next(option for option in get_args(hint) if option is not type(None)))
        return [*good, "None"], bad
    if args := get_args(hint):
        return words_of(args[0])
    return {int: INTS, float: FLOATS, bool: (["true", "false"], ["", "2"])}[hint]


def fields() -> dict[str, tuple[list[str], list[str]]]:
    found = {}
    for section in dataclasses.fields(Config):
        kind = get_type_hints(Config)[section.name]
        for name, hint in get_type_hints(kind, include_extras=True).items():
            path = f"{section.name}.{name}"
            found[path] = WORDS[path] if path in WORDS else words_of(hint)
    return found


FIELDS = fields()


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """Some fields, most of them with words that are good for most fields."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=6, unique=True))
    return [
        f"{name}={draw(st.sampled_from(FIELDS[name][0 if draw(st.integers(0, 9)) else 1]))}"
        for name in names
    ]


@contextmanager
def within_time() -> Iterator[None]:
    def hang(*_: Any) -> None:
        raise AssertionError(f"it hangs: {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_sentence(error: UserError) -> None:
    text = str(error)
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert len(text) > 20, text


def outcome(work: Callable[[], Any]) -> str:
    """How it ends: well, or with a sentence."""
    try:
        with within_time():
            work()
    except UserError as error:
        check_sentence(error)
        return "refused"
    return "good"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files that settings may name."""
    monkeypatch.chdir(tmp_path)
    small_config(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "other.txt").write_text("some other text, " * 200)
    np.save("tokens.npy", np.arange(3000) % 200)
    (np.arange(3000) % 200).astype("<u2").tofile("tokens.bin")
    Path("empty.txt").touch()
    Path("garbage.npy").write_bytes(b"\x93NUMPY garbage")
    Plan(1, (2,), ((5, 3),)).save(tmp_path / "plan.json")
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("short_flags")
def test_any_settings_train_a_step_or_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    seen: Counter[str] = Counter()

    def run(words: list[str]) -> None:
        args = [f"--config.{word}" for word in [*BASE, *words]]
        config = parse([*args, "--workdir=run"], "program").config
        num_devices = min(config.mesh.num_devices, 8)
        train(config, Path("run"), jax.devices()[:num_devices], Lines())
        assert [line["step"] for line in metrics(Path("run"))][-1] == config.train.num_steps

    @settings(max_examples=max(10, EXAMPLES // 5))
    @given(overrides())
    def try_out(words: list[str]) -> None:
        shutil.rmtree("run", ignore_errors=True)
        try:
            seen[outcome(lambda: run(words))] += 1
        except SystemExit:  # by tyro, for what is no word of a field's type
            assert "Traceback" not in capsys.readouterr().err
            seen["refused"] += 1

    try_out()
    assert min(seen["good"], seen["refused"]) > sum(seen.values()) / 10, seen
    with capsys.disabled():
        print(dict(seen), end=" ")


@given(st.sampled_from(sorted(FIELDS)), st.sampled_from(VALUES))
def test_any_value_in_a_config_file_is_taken_or_refused(path: str, value: Any):
    section, name = path.split(".")
    config = Config()

    def make() -> None:
        own = dataclasses.replace(getattr(config, section), **{name: value})
        made = dataclasses.replace(config, **{section: own})
        json.dumps(to_dict(made), allow_nan=False)

    outcome(make)


def nodes(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value in JSON."""
    yield path
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from nodes(value, (*path, key))


@st.composite
def damaged_json(draw: st.DrawFn, content: Any) -> bytes:
    """With a value replaced or left out, or with bytes of its text changed."""
    content = json.loads(json.dumps(content))
    if draw(st.booleans()):
        return draw(damaged_bytes(json.dumps(content).encode()))
    path = draw(st.sampled_from(list(nodes(content))[1:]))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if draw(st.booleans()):
        del inner[path[-1]]
    else:
        value = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
        inner[path[-1]] = draw(st.one_of(value, st.lists(value, max_size=3)))
    return json.dumps(content).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, or with a few bytes changed."""
    changed = bytearray(content)
    if draw(st.booleans()):
        return bytes(changed[: draw(st.integers(0, len(changed) - 1))])
    for at in draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=3)):
        changed[at] = draw(st.integers(0, 255))
    return bytes(changed)


PREDICTION = Prediction(1.0, 0.1, ((0.2, 0.3),), ((0.4, 0.5),), ((0.0, 0.0),), True, 1.0)
PLAN = Plan(2, (2,), ((5, 3),), PREDICTION)


@given(damaged_json(PLAN.to_dict()))
def test_a_damaged_plan_is_a_plan_or_refused(tmp_path_factory: Any, content: bytes):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_bytes(content)
    outcome(lambda: Console(is_quiet=True).show_plan(load_plan(path, PlanRequest(2, 2, 8)), (1, 1)))


TABLE = {
    "unit_tokens": 4,
    "forward": [[[0.1, 0.2], [0.3, None]], [[0.2, 0.3], [0.5, None]]],
    "backward": [[[0.2, 0.3], [0.5, None]], [[0.3, 0.5], [0.9, None]]],
}


@given(damaged_json(TABLE))
def test_damaged_latencies_are_planned_with_or_refused(tmp_path_factory: Any, content: bytes):
    path = tmp_path_factory.mktemp("latency") / "latency.json"
    path.write_bytes(content)
    outcome(lambda: find_plan(load_table(path), PlanRequest(2, 2, 8), (1.0, 1.0)))


@given(st.sampled_from(["tokens.npy", "tokens.bin"]), st.data())
def test_damaged_token_files_are_read_or_refused(
    tmp_path_factory: Any, name: str, data: st.DataObject
):
    path = tmp_path_factory.mktemp("tokens") / name
    tokens = (np.arange(400) % 200).astype("<u2")
    if name == "tokens.npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    config = Config(data=dataclasses.replace(Config().data, train=str(path)))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=8))

    def read() -> None:
        for batches in open_data(config):
            batch = batches.batch(0)
            assert batch.dtype == np.int32
            assert ((batch >= 0) & (batch < 256)).all()

    outcome(read)


@given(damaged_json(to_dict(Config())))
def test_a_damaged_config_json_is_read_or_refused(tmp_path_factory: Any, content: bytes):
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "config.json").write_bytes(content)
    outcome(lambda: changed_settings(Config(), workdir))


@given(damaged_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n'))
def test_damaged_metrics_are_continued_or_refused(tmp_path_factory: Any, content: bytes):
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "metrics.jsonl").write_bytes(content)

    def write() -> None:
        with closing(Metrics(workdir, 2)) as lines:
            lines.write(3, {"loss": 1.0})
        assert metrics(workdir)[-1] == {"step": 3, "loss": 1.0}

    outcome(write)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of steps 1 and 2, with those numbers in their scalars."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder, CheckpointConfig(), MODEL, print) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_on(MeshConfig(), number=step))
    return folder


@pytest.mark.slow
@settings(max_examples=max(20, EXAMPLES // 2))
@given(st.data())
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_is_used(
    two_checkpoints: Path, tmp_path_factory: Any, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(two_checkpoints, folder, dirs_exist_ok=True)
    files = sorted(path for path in (folder / "2").rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files), "file")
    content = path.read_bytes()
    how = data.draw(st.sampled_from(["bytes", "remove", "folder", "link", "pipe", "add"]), "how")
    if how == "add":
        path.with_name("other").write_bytes(content)
    else:
        path.unlink()
    if how == "bytes":
        path.write_bytes(changed := data.draw(damaged_bytes(content)))
        how = "nothing" if changed == content else how
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to("/etc/passwd")
    elif how == "pipe":
        os.mkfifo(path)
    said: list[str] = []
    with (
        within_time(),
        Checkpoints(folder, CheckpointConfig(), MODEL, said.append) as checkpoints,
    ):
        expected = 2 if how == "nothing" else 1
        assert checkpoints.newest_step() == expected
        assert len(said) == 2 - expected
        restored = checkpoints.restore(expected, abstract(MeshConfig())[1])
    chex.assert_trees_all_equal(restored, state_on(MeshConfig(), number=expected))
