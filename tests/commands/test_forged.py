"""Runs and models from strangers, whose files lie and have right digests: each is read as what it
holds, or refused with one sentence. Nothing in them is executed, and no other file is opened.

python -m pytest -m "slow or not slow" tests/commands/test_forged.py     # a few of each
... -n 0 -s --hypothesis-profile=thorough                                # five thousand
"""

import hashlib
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.forged import (
    bounded_memory,
    forged_bytes,
    forged_json,
    link_to,
    outside_of,
    paths_to,
    watched,
)
from support.latencies import profile
from support.runs import Lines, small_config
from tpipe_jax.cli import checkpoints as checkpoints_list
from tpipe_jax.commands.train import train
from tpipe_jax.commands.trained_model import load
from tpipe_jax.config.command_line import parse_evaluate
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.own_runs import check_named
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig
from tpipe_jax.data.carried import with_kept_tokenizer
from tpipe_jax.errors import UserError
from tpipe_jax.interop.convert import export_model, import_model
from tpipe_jax.planning.latency import Deferral
from tpipe_jax.planning.latency_file import load_table
from tpipe_jax.planning.plan import Plan, PlanRequest, load_plan
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.simulate import simulate
from tpipe_jax.reporting.console import Console
from tpipe_jax.reporting.loss_plot import draw_losses
from tpipe_jax.reporting.metrics import Metrics
from tpipe_jax.reporting.plan_report import draw_plan
from tpipe_jax.reporting.trace_file import EXPECTED, MEASURED, read_timeline, read_trace
from tpipe_jax.reporting.workdir import add_measured_ticks, changed_settings, describe_in_files

EXAMPLES = settings.default.max_examples if settings.default else 100
SECONDS = 120  # after which a reading hangs
MODEL = ModelConfig(num_layers=2, d_model=8, num_heads=2, d_ff=16, vocab_size=256, seq_len=8)


@dataclass(frozen=True)
class Made:
    """What strangers start from."""

    run: Path
    model: Path
    """The run's weights as a Hugging Face folder."""
    config: Config
    plan: Plan
    params: dict[str, np.ndarray]


def arrays_of(workdir: Path) -> dict[str, np.ndarray]:
    """The parameters that evaluation reads."""
    flags = parse_evaluate([f"--workdir={workdir}", "--data=text.txt"], "program")
    path = workdir / "config.json"
    data = with_kept_tokenizer(load_config(path).data, workdir)
    check_named(path, Config(data=data), {"data.tokenizer": "add --tokenizer={}"})
    config = Config(ModelConfig(block=flags.block), MeshConfig(), data=data)
    trained = load(workdir, flags.step, config, jax.devices()[:1])
    found = jax.tree_util.tree_leaves_with_path(trained.params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    config = small_config(folder)
    config = replace(
        config,
        model=MODEL,
        train=replace(config.train, num_steps=1, eval_batches=1),
        plan=replace(config.plan, token_slices="5,3"),
    )
    run, model = folder / "run", folder / "model"
    train(config, run, jax.devices()[:2], Lines())
    profile(deferral=Deferral((0.5, 0.25), (0.25, 0.125))).table(16).save(run / "latency.json")
    planning = find_plan(load_table(run / "latency.json"), PlanRequest(2, 4, 128), [1.0, 1.0])
    planning.plan.save(run / "plan.json")
    describe_in_files(config, run, planning.plan, planning.chunk_factors)
    schedule = make_schedule(planning.plan)
    ones = [1.0] * len(schedule.items)
    add_measured_ticks(run, planning.plan, 1, simulate(schedule, ones, ones))
    export_model(run, model, None, "bytes")
    return Made(run, model, config, planning.plan, arrays_of(run))


# ------------------------------------------------------------------------------------- outcomes


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


def outcome(work: Callable[[], Any], folder: Path, outside: Path) -> tuple[str, Any]:
    """How a reading of the folder ends: "good" and its result, or "refused" with a sentence."""
    said, result, how = StringIO(), None, "refused"
    state = folder.parents[1] / "state"  # where runs of this user are noted
    with watched(folder, outside, (state,)) as seen, within_time():
        try:
            with redirect_stderr(said), redirect_stdout(said):
                result, how = work(), "good"
        except UserError as error:
            check_sentence(str(error))
    assert not seen, seen
    assert "Traceback" not in said.getvalue()
    assert "executed" not in said.getvalue()
    return how, result


def check_sentence(text: str) -> None:
    assert "\n" not in text, text
    assert text.endswith("."), text[-200:]
    assert 20 < len(text) < 3000, text[:3000]


Forge = Callable[[st.DataObject, Made, Path, Path], str]
FORGES: dict[str, tuple[Forge, int]] = {}  # each with its share of the examples, in parts


def forge(share: int) -> Callable[[Forge], Forge]:
    def add(function: Forge) -> Forge:
        FORGES[function.__name__] = function, share
        return function

    return add


def try_out(
    name: str, num_examples: int, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """Forges and reads, in little memory: the share of the examples that a format has. Returns how
    often each outcome came.
    """
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder, seen = tmp_path / name, Counter[str]()
    folder.mkdir()
    outside = outside_of(folder / "x")
    shutil.copytree(made.run, outside / "paths")  # what links may lead to
    function, share = FORGES[name]
    total = sum(share for _, share in FORGES.values())

    @settings(
        max_examples=num_examples * share // total,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # a failure shows its example; to shrink it takes minutes
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        shutil.rmtree(folder / "run", ignore_errors=True)
        (folder / "run").mkdir()
        seen[function(data, made, folder / "run", outside)] += 1

    with bounded_memory():
        one()
    return seen


def forged(data: st.DataObject, source: Path, target: Path, outside: Path) -> None:
    """Writes a JSON file of the run, changed."""
    content = json.loads(source.read_text())
    target.write_bytes(data.draw(forged_json(content, paths_to(outside))))


# -------------------------------------------------------------------------------- plans and plots


@forge(6)
def plan(data: st.DataObject, made: Made, run: Path, outside: Path) -> str:
    forged(data, made.run / "plan.json", run / "plan.json", outside)
    request = replace(PlanRequest(2, 4, 128), num_layers=2)

    def read() -> None:
        found = load_plan(run / "plan.json", request)
        assert found.batch_size == 4
        assert {sum(own) for own in found.token_slices} == {128}
        assert all(type(n) is int for own in found.token_slices for n in own)
        Console(is_quiet=True).show_plan(found, (1.0,) * 2 * found.num_chunks)

    return outcome(read, run, outside)[0]


@forge(6)
def latency(data: st.DataObject, made: Made, run: Path, outside: Path) -> str:
    forged(data, made.run / "latency.json", run / "latency.json", outside)

    def read() -> None:
        table = load_table(run / "latency.json")
        seq_len = min(table.unit_tokens * table.forward.shape[1], 2**31 - 1)
        planning = find_plan(table, PlanRequest(2, 4, seq_len, num_layers=4), [1.0, 1.0])
        Console(is_quiet=True).show_planning(planning)
        if data.draw(st.integers(0, 30)) == 0:  # it takes a second
            draw_plan(run, table, planning)

    return outcome(read, run, outside)[0]


@forge(6)
def config(data: st.DataObject, made: Made, run: Path, outside: Path) -> str:
    forged(data, made.run / "config.json", run / "config.json", outside)

    def read() -> None:
        found = load_config(run / "config.json")
        with_kept_tokenizer(found.data, run)
        changed_settings(made.config, run)

    return outcome(read, run, outside)[0]


@forge(6)
def metrics(data: st.DataObject, made: Made, run: Path, outside: Path) -> str:
    lines = (made.run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    number = data.draw(st.integers(0, len(lines) - 1))
    changed = data.draw(forged_json(json.loads(lines[number]), paths_to(outside)))
    lines[number] = changed + data.draw(st.sampled_from([b"\n", b"\n", b"", b"\r\n", b"\x00\n"]))
    (run / "metrics.jsonl").write_bytes(b"".join(lines))

    def read() -> None:
        if data.draw(st.integers(0, 3)):
            draw_losses([run], run / "loss.png")
        else:
            Metrics(run, 1).close()

    return outcome(read, run, outside)[0]


@forge(6)
def timeline(data: st.DataObject, made: Made, run: Path, outside: Path) -> str:
    """A timeline that is none is drawn anew, so nothing is refused."""
    shutil.copy(made.run / "plan.json", run)
    forged(data, made.run / "timeline.json", run / "timeline.json", outside)

    schedule = make_schedule(made.plan)

    def read() -> None:
        for kind in (EXPECTED, MEASURED):
            found = read_timeline(read_trace(run / "timeline.json", kind), schedule)
            boxes = found[1].boxes if found else ()
            assert all(box.stage in (0, 1) and box.stop_seconds < 1e10 for box in boxes)
        if data.draw(st.integers(0, 9)):
            return  # drawing takes a second
        describe_in_files(made.config, run, made.plan, [1.0, 1.0])
        if data.draw(st.booleans()):
            ones = [1.0] * len(schedule.items)
            add_measured_ticks(run, made.plan, 1, simulate(schedule, ones, ones))
        events = json.loads((run / "timeline.json").read_text())["traceEvents"]
        assert all(event["pid"] in (0, 1) for event in events)

    how, _ = outcome(read, run, outside)
    assert how == "good"
    return how


# ----------------------------------------------------------------------------------- checkpoints


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def seal(checkpoint: Path, content: bytes) -> None:
    """Writes a manifest with its digest."""
    (checkpoint / "manifest.json").write_bytes(content)
    digest = f"{sha256(content)}  manifest.json\n"
    (checkpoint / "manifest.sha256").write_text(digest)


def seal_files(checkpoint: Path) -> None:
    """Writes the manifest that all files of the checkpoint agree with."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in ("manifest.json", "manifest.sha256"):
            content = path.read_bytes()
            files[path.relative_to(checkpoint).as_posix()] = [len(content), sha256(content)]
    seal(checkpoint, json.dumps(manifest | {"files": files}).encode())


def forge_checkpoint(data: st.DataObject, how: str, checkpoint: Path, outside: Path) -> None:
    """Changes a checkpoint, whose digests are right again afterwards."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    files = [path for path in files if path.parent != checkpoint]
    if how == "manifest":
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        part = data.draw(st.sampled_from(["all", "identity", "files", "name"]))
        if part == "all":
            content = data.draw(forged_json(manifest, paths_to(outside)))
        elif part == "name":
            old = data.draw(st.sampled_from(sorted(manifest["files"])))
            new = data.draw(st.sampled_from([*paths_to(outside), f"./{old}", f"{old}/"]))
            manifest["files"][new] = manifest["files"].pop(old)
            content = json.dumps(manifest).encode()
        else:
            text = data.draw(forged_json(manifest[part], paths_to(outside)))
            manifest[part] = "@@"
            content = json.dumps(manifest).encode().replace(b'"@@"', text)
        seal(checkpoint, content)
    elif how == "zarr":
        path = data.draw(st.sampled_from([path for path in files if path.name == ".zarray"]))
        text = data.draw(forged_json(json.loads(path.read_text()), paths_to(outside)))
        path.write_bytes(text)
        seal_files(checkpoint)
    elif how == "chunk":
        path = data.draw(st.sampled_from([path for path in files if path.name != ".zarray"]))
        path.write_bytes(data.draw(forged_bytes(path.read_bytes())))
        seal_files(checkpoint)
    elif how == "gone":
        data.draw(st.sampled_from(files)).unlink()
        seal_files(checkpoint)
    elif how == "more":
        name = data.draw(st.sampled_from(["x", ".zattrs", ".zgroup", "zarr.json", "conftest.py"]))
        text = data.draw(st.sampled_from(["raise SystemExit('executed')", "{}", '{"x": 1}']))
        (data.draw(st.sampled_from(files)).parent / name).write_text(text)
        seal_files(checkpoint)
    else:
        link(data, checkpoint, files, outside)


def link(data: st.DataObject, checkpoint: Path, files: list[Path], outside: Path) -> None:
    """Puts a link in the place of a file or folder. What it leads to is as the run had it."""
    path = data.draw(st.sampled_from(files))
    run = checkpoint.parents[1]
    folders = [path.parent, checkpoint, checkpoint.parent]
    made = data.draw(
        st.sampled_from([path, path, checkpoint / "manifest.json", run / "config.json", *folders])
    )
    target = outside / "paths" / made.relative_to(run)
    if made.is_dir():
        shutil.rmtree(made)
        made.symlink_to(target)
    else:
        link_to(made, data.draw(st.sampled_from([str(target), "/etc/passwd", "/dev/zero"])))


@forge(14)
def checkpoint(data: st.DataObject, made: Made, run: Path, outside: Path) -> str:
    run.rmdir()
    shutil.copytree(made.run, run)
    how = data.draw(
        st.sampled_from(["manifest", "manifest", "zarr", "chunk", "gone", "more", "link"])
    )
    forge_checkpoint(data, how, run / "checkpoints" / "1", outside)

    def read() -> Any:
        with suppress(UserError):
            checkpoints_list.main([str(run)], "program")
        if data.draw(st.integers(0, 3)) == 0:
            export_model(run, run / "exported", None, "bytes")
        return arrays_of(run)

    end, params = outcome(read, run, outside)
    if how == "link":
        assert end == "refused"
    if params is not None and how in ("manifest", "more"):
        assert params.keys() == made.params.keys()
        for name, array in params.items():
            np.testing.assert_array_equal(array, made.params[name])
    return f"{how} {end}"


# ---------------------------------------------------------------------------- Hugging Face folders


def split_safetensors(content: bytes) -> tuple[Any, bytes]:
    """The header and the data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@forge(6)
def imported(data: st.DataObject, made: Made, run: Path, outside: Path) -> str:
    model = run / "model"
    shutil.copytree(made.model, model)
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    how = data.draw(st.sampled_from([*names, "weights", "bytes", "index", "link"]))
    weights = model / "model.safetensors"
    if how in names:
        forged(data, made.model / how, model / how, outside)
    elif how == "weights":
        header, rest = split_safetensors(weights.read_bytes())
        weights.write_bytes(joined(data.draw(forged_json(header, paths_to(outside))), rest))
    elif how == "bytes":
        weights.write_bytes(data.draw(forged_bytes(weights.read_bytes())))
    elif how == "index":
        header, _ = split_safetensors(weights.read_bytes())
        places = {name: weights.name for name in header if name != "__metadata__"}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        shutil.move(weights, model / "part.safetensors")
        if data.draw(st.booleans()):
            index["weight_map"] = dict.fromkeys(places, "part.safetensors")
        text = data.draw(forged_json(index, paths_to(outside)))
        (model / "model.safetensors.index.json").write_bytes(text)
    else:
        name = data.draw(st.sampled_from([*names, weights.name]))
        shutil.copy(model / name, outside / name)
        link_to(model / name, data.draw(st.sampled_from([str(outside / name), "/etc/passwd"])))

    def read() -> Any:
        import_model(model, run / "new")
        return arrays_of(run / "new")

    end, params = outcome(read, run, outside)
    if how == "link":
        assert end == "refused"
    if params is not None and how not in ("weights", "bytes", "config.json"):
        for name, array in params.items():
            np.testing.assert_array_equal(array, made.params[name])
    return f"{how} {end}"


# ----------------------------------------------------------------------------------------- tests


@pytest.mark.slow
@pytest.mark.parametrize("name", FORGES)
def test_what_strangers_send(
    name: str,
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    seen = try_out(name, EXAMPLES, made, tmp_path, monkeypatch)
    with capsys.disabled():
        print(name, dict(sorted(seen.items())))


@pytest.mark.parametrize("name", ["plan", "latency", "config", "metrics", "timeline"])
def test_a_few_that_strangers_send(
    name: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    try_out(name, 100, made, tmp_path, monkeypatch)
