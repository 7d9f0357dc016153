"""Checkpoints that a stranger has written, with digests that fit: nothing in them is executed, and
none takes memory or time beyond its size.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tpipe_jax
from support import zarr_files
from support.checkpoints import open_folder
from support.forged import bounded_memory, watched
from support.numbered_states import MODEL, state_on
from tpipe_jax.checkpoint import manifest
from tpipe_jax.checkpoint.checkpoints import newest_sound
from tpipe_jax.cli import evaluate, generate
from tpipe_jax.commands.trained_model import load
from tpipe_jax.config.command_line import parse, parse_plan
from tpipe_jax.config.settings import Config, DataConfig, MeshConfig, resolved_model, to_dict
from tpipe_jax.devices import startup
from tpipe_jax.errors import UserError
from tpipe_jax.interop.convert import export_model
from tpipe_jax.reporting.workdir import write_config

TABLE = "params/embed/tokens"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a checkpoint of step 3, and config.json."""
    folder = tmp_path_factory.mktemp("made")
    with open_folder(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, state_on(MeshConfig()))
    (folder / "config.json").write_text(json.dumps(to_dict(Config(model=MODEL))))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def forge(run: Path, change: Callable[[Any], Any] = lambda content: content) -> None:
    """Writes the manifest anew, with all digests, after a change of it."""
    checkpoint = run / "checkpoints" / "3"
    content = json.loads((checkpoint / "manifest.json").read_text())
    own = (manifest.MANIFEST, manifest.MANIFEST_DIGEST)
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name not in own]
    content["files"] = {
        path.relative_to(checkpoint).as_posix(): (
            path.stat().st_size,
            manifest.digest(path.read_bytes()),
        )
        for path in files
    }
    text = json.dumps(change(content)).encode()
    (checkpoint / "manifest.json").write_bytes(text)
    line = f"{manifest.digest(text)}  {manifest.MANIFEST}\n"
    (checkpoint / manifest.MANIFEST_DIGEST).write_text(line)


def loaded(run: Path) -> Any:
    return load(run, None, Config(), jax.devices()).params


def refused(run: Path) -> str:
    """The sentence with which the model of a run is refused, at once and without much memory."""
    before = time.monotonic()
    with bounded_memory(), pytest.raises(UserError) as error:
        loaded(run)
    assert time.monotonic() - before < 30
    [line] = str(error.value).splitlines()
    assert line.isprintable()
    assert len(line) < 1000
    return line


def with_model(**values: Any) -> Callable[[Any], Any]:
    return lambda content: content | {"identity": {"model": content["identity"]["model"] | values}}


MANIFESTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "list": (lambda c: [], "manifest.json is none"),
    "empty": (lambda c: {}, "manifest.json is none"),
    "no files": (lambda c: c | {"files": {}}, "does not belong to it"),
    "files are a list": (lambda c: c | {"files": []}, "its files has the wrong type"),
    "no digest": (lambda c: c | {"files": {"a": [1, "abc"]}}, "no size and digest of a"),
    "negative size": (lambda c: c | {"files": {"a": [-1, 64 * "a"]}}, "no size and digest of a"),
    "true step": (lambda c: c | {"step": True}, "its step has the wrong type"),
    "block is a number": (lambda c: c | {"block": 3}, "no digest of a block"),
    "no identity": (lambda c: c | {"identity": []}, "its identity has the wrong type"),
    "no model": (lambda c: c | {"identity": {}}, "it has no settings of one"),
    "model is a list": (lambda c: c | {"identity": {"model": [1]}}, "it has no settings of one"),
    "unknown setting": (with_model(colour=3), "unexpected keyword argument 'colour'"),
    "layers are text": (with_model(num_layers="5"), "num_layers='5' must be of type int"),
    "long text": (with_model(num_layers=10**6 * "5"), "describes no model"),
    "no layers": (with_model(num_layers=0), "num_layers=0 must be at least 1"),
    "a million layers": (with_model(num_layers=10**6), "it has 5 of config.model.num_layers=10000"),
    "many layers": (with_model(num_layers=2**31 - 1), "it has 5 of config.model.num_layers=21474"),
    "own block": (with_model(num_layers=10**6, block="x.py:X"), "it has 5 of config.model.num_lay"),
    "vocabulary": (with_model(vocab_size=10**9), f"{TABLE} has 1024 bytes, but its model has 6400"),
    "sequence": (with_model(seq_len=10**9), "params/embed/positions has 512 bytes, but its model"),
    "width": (with_model(d_model=2**30), "bytes, but its model has"),
    "feed-forward": (with_model(d_ff=10**9), "ff_in/kernel has 4096 bytes, but its model has"),
    "one more": (with_model(vocab_size=12), f"{TABLE} has shape [11, 16] instead of [12, 16]"),
    "one less": (with_model(vocab_size=10), f"{TABLE} has shape [11, 16] instead of [10, 16]"),
}


@pytest.mark.parametrize(("change", "sentence"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_its_files_do_not_bear_out(
    run: Path, change: Callable[[Any], Any], sentence: str
):
    forge(run)
    loaded(run)
    forge(run, change)
    assert sentence in refused(run)


def zarray(run: Path, **values: Any) -> None:
    path = run / "checkpoints" / "3" / TABLE / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def chunk(run: Path) -> Path:
    return run / "checkpoints" / "3" / TABLE / "0.0"


BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}
ARRAYS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "huge chunks": (lambda r: zarray(r, chunks=[10**6, 10**6]), "chunks of other sizes than"),
    "tiny chunks": (lambda r: zarray(r, chunks=[1, 1]), "chunks of other sizes than"),
    "fewer chunks": (
        lambda r: (
            zarray(r, chunks=[8, 8]),
            [chunk(r).with_name(name).write_bytes(bytes(256)) for name in ("0.0", "0.1", "1.0")],
        ),
        "has 3 chunks, not as many as .zarray says",
    ),
    "no chunks": (lambda r: zarray(r, chunks=[0, 0]), ".zarray has no chunks"),
    "chunks of text": (lambda r: zarray(r, chunks="11"), ".zarray has no chunks"),
    "one axis": (lambda r: zarray(r, chunks=[176]), "chunks of 1 axes instead of 2"),
    "compressed": (lambda r: zarray(r, compressor=BLOSC), 'has compressor {"id": "blosc"'),
    "zip bomb": (lambda r: zarray(r, compressor={"id": "zlib", "level": 9}), 'r {"id": "zlib"'),
    "whole numbers": (lambda r: zarray(r, dtype="<i4"), 'has dtype "<i4" instead of "<f4"'),
    "big end": (lambda r: zarray(r, dtype=">f4"), 'has dtype ">f4" instead of "<f4"'),
    "other order": (lambda r: zarray(r, order="F"), 'has order "F" instead of "C"'),
    "fill": (lambda r: zarray(r, fill_value=1.0), "has fill_value 1.0 instead of null"),
    "filters": (lambda r: zarray(r, filters=[{"id": "delta"}]), "has filters [{"),
    "format": (lambda r: zarray(r, zarr_format=3), "has zarr_format 3 instead of 2"),
    "separator": (lambda r: zarray(r, dimension_separator="/"), 'has dimension_separator "/"'),
    "more": (lambda r: zarray(r, more="nothing"), 'has more "nothing" instead of nothing'),
    "shape": (lambda r: zarray(r, shape=[10**9, 16]), "has shape [1000000000, 16] instead of"),
    "true": (lambda r: zarray(r, chunks=[True, 16]), ".zarray has no chunks"),
    "list": (lambda r: (chunk(r).parent / ".zarray").write_text("[]"), ".zarray is no object"),
    "deep": (lambda r: (chunk(r).parent / ".zarray").write_text(10**5 * "["), "is nested more"),
    "a folder": (lambda r: (chunk(r).parent / "0.1").mkdir(), "has chunks of other sizes"),
}


@pytest.mark.parametrize(("change", "sentence"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_are_not_as_they_are_written(
    run: Path, change: Callable[[Path], Any], sentence: str
):
    change(run)
    forge(run)
    assert sentence in refused(run)


def test_arrays_of_older_versions_are_read(run: Path):
    zarray(run, dimension_separator=".")
    forge(run)
    got = np.asarray(loaded(run)["embed"]["tokens"])
    want = zarr_files.read_array(run / "checkpoints" / "3" / TABLE)
    np.testing.assert_array_equal(got[: MODEL.vocab_size], want)


# ------------------------------------------------------------------------------------------ code


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def hostile(run: Path, marker: Path) -> Path:
    """A run that names its own code wherever a file could."""
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Block: pass\n"
    checkpoint = run / "checkpoints" / "3"
    (run / "block.py").write_text(code)
    (checkpoint / "params" / "block.py").write_text(code)
    block = f"{checkpoint / 'params' / 'block.py'}:Block"
    named = {"auto_map": {"AutoTokenizer": ["block.Block", None], "AutoModel": "block.Block"}}
    named |= {"trust_remote_code": True, "eos_token": "a", "tokenizer_class": "block.Block"}
    config = to_dict(Config(model=MODEL))
    config["model"]["block"] = f"{run / 'block.py'}:Block"
    config["data"]["tokenizer"] = "tokenizer.json"
    (run / "config.json").write_text(json.dumps(config))
    (run / "plan.json").write_text(json.dumps({"schedule": block} | named))
    (run / "latency.json").write_text(json.dumps({"profile": {"block": block}} | named))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (run / name).write_text(json.dumps(named))
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (run / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    forge(run, with_model(block=block))
    return run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take the devices that there are."""
    monkeypatch.setattr(startup, "find_devices", lambda _: jax.devices())


@pytest.mark.usefixtures("here")
def test_no_command_executes_what_a_file_names(
    hostile: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(hostile)
    for use in (
        lambda: loaded(hostile),
        lambda: parse([f"--workdir={hostile}"], "train"),
        lambda: parse_plan([f"--config={hostile}/config.json"], "plan"),
        lambda: generate.main([f"--workdir={hostile}", "--prompt=a"], "generate"),
        lambda: evaluate.main([f"--workdir={hostile}", "--data=pydocs"], "evaluate"),
    ):
        with pytest.raises(UserError, match=r"which is code and is only loaded if you name it"):
            use()
    assert not marker.exists()


@pytest.mark.usefixtures("here")
def test_no_place_that_a_stranger_names_is_opened(run: Path, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    secret, tokenizer = outside / "secret.txt", outside / "tokenizer.json"
    secret.write_text("ab" * 99)
    tokenizer.write_text(json.dumps({"version": "1.0", "model": words}))
    config = Config(model=MODEL)
    config = replace(config, data=DataConfig(str(secret), tokenizer=str(tokenizer)))
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    own = str(shutil.copy(tokenizer, tmp_path / "own.json"))
    workdir, text = f"--workdir={run}", "config.data.tokenizer="
    uses: list[tuple[Callable[[], Any], str]] = [
        (lambda: evaluate.main([workdir], "x"), f"{text}{tokenizer}, which is only used if"),
        (lambda: evaluate.main([workdir, f"--data={own}"], "x"), f"add --tokenizer={tokenizer}"),
        (lambda: evaluate.main([workdir, f"--tokenizer={own}"], "x"), f"add --data={secret}"),
        (lambda: generate.main([workdir, "--prompt=a"], "x"), f"add --tokenizer={tokenizer}"),
        (lambda: export_model(run, tmp_path / "to", None), f"add --tokenizer={tokenizer}"),
        (lambda: tpipe_jax.load(run).generate("a"), f"copy {tokenizer} to tokenizer.json in"),
        (lambda: tpipe_jax.load(run).evaluate(own), f"copy {tokenizer} to tokenizer.json in"),
        (lambda: tpipe_jax.load(run).save(tmp_path / "to"), f"add --tokenizer={tokenizer}"),
    ]
    with watched(run, outside, (tmp_path,)) as seen:
        for use, sentence in uses:
            with pytest.raises(UserError) as error:
                use()
            assert sentence in str(error.value)
        generate.main([workdir, "--prompt-ids=1", "--max-tokens=1"], "x")  # needs no tokenizer
    assert not [line for line in seen if str(outside) in line]
    shutil.copy(tokenizer, run / "tokenizer.json")
    with pytest.raises(UserError, match=rf"call evaluate\({secret}\), or what you want"):
        tpipe_jax.load(run).evaluate()


def own_block(folder: Path, more: str = "") -> str:
    path = folder / "own.py"
    path.write_text(
        "from tpipe_jax.model.gpt2 import GPT2Block\n"
        f"class Own(GPT2Block):\n    norms = {{}}\n    linears = {{}}\n{more}"
    )
    return f"{path}:Own"


def test_a_checkpoint_knows_the_file_of_its_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    block = own_block(tmp_path)
    run, model = tmp_path / "run", Config(model=replace(MODEL, block=block)).model
    with open_folder(run / "checkpoints", model=model) as checkpoints:
        checkpoints.save(3, state_on(MeshConfig()))
    digest = manifest.digest((tmp_path / "own.py").read_bytes())
    assert manifest.read_manifest(run / "checkpoints" / "3").block == digest
    assert newest_sound(run)[1] == resolved_model(model)
    with pytest.raises(UserError, match=rf"block={block} \(of SHA-256 {digest}\), which is code"):
        loaded(run)
    write_config(Config(model=model), run)
    with pytest.raises(UserError, match=rf"block={block} \(of SHA-256 {digest}\), which is code"):
        parse([f"--workdir={run}"], "program")

    config = Config(model=model)
    load(run, None, config, jax.devices())
    assert capsys.readouterr().err == ""
    (tmp_path / "moved").mkdir()
    moved = own_block(tmp_path / "moved", "# a comment\n")
    other = manifest.digest((tmp_path / "moved" / "own.py").read_bytes())
    line = f"the file of config.model.block={moved} has SHA-256 {other}, but the checkpoint was "
    load(run, None, Config(model=replace(MODEL, block=moved)), jax.devices())
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {line}written with {digest}: ")
    lines: list[str] = []
    with open_folder(
        run / "checkpoints", model=replace(MODEL, block=moved), said=lines
    ) as checkpoints:
        assert checkpoints.newest_step() == 3
    assert lines[0].startswith(line)
