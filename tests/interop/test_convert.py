"""GPT-2 folders in and out, beside transformers."""

import fcntl
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from support import runs, zarr_files
from support.forged import bounded_memory
from tpipe_jax.checkpoint.arrays import read_array
from tpipe_jax.checkpoint.checkpoints import Checkpoints
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.settings import CheckpointConfig, Config, ModelConfig, resolved_model
from tpipe_jax.data.tokenizer import open_tokenizer, train_bpe
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.errors import UserError
from tpipe_jax.interop import convert, gpt2, hugging_face, write_folder
from tpipe_jax.model import reference as plain_model
from tpipe_jax.model import transformer
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.reporting.workdir import write_config
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state, init_state

SIZES: dict[str, Any] = {
    "n_layer": 3,
    "n_embd": 24,
    "n_head": 3,
    "n_inner": 40,
    "vocab_size": 53,
    "n_positions": 20,
}
MODEL = ModelConfig(3, 24, 3, 40, vocab_size=53, seq_len=20)
REASON = 'needs torch and transformers: pip install -e ".[interop]"'


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A GPT2LMHeadModel whose norms and biases are random too, and the folder it is saved in."""
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    torch.manual_seed(0)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()
    for parameter in gpt.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("gpt2")
    gpt.save_pretrained(folder)
    return gpt, folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `export` writes it, made of fresh parameters without torch."""
    params = jax.device_get(transformer.init(MODEL, jax.random.key(0)))
    values = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(value)
        for path, value in jax.tree.leaves_with_path(params)
    }
    made = tmp_path / "made"
    made.mkdir()
    write_folder.write_model(made, gpt2.ADAPTER, MODEL, values.__getitem__)
    return made


def restored(workdir: Path, config: Config) -> Any:
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    like = abstract_state(make_spec(config, mesh), make_optimizer(config))
    with Checkpoints(workdir / "checkpoints", CheckpointConfig(), config.model, print) as folder:
        assert folder.newest_step() == 0
        return folder.restore(0, like)


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
def test_logits_of_imported_weights_are_those_of_transformers(
    saved: tuple[Any, Path], tmp_path: Path, max_shard_size: str
):
    torch = pytest.importorskip("torch", reason=REASON)
    gpt, _ = saved
    source = tmp_path / "source"
    gpt.save_pretrained(source, max_shard_size=max_shard_size)
    assert (source / "model.safetensors").exists() == (max_shard_size == "5GB")
    config = convert.import_model(source, tmp_path / "run")
    assert config.model == resolved_model(MODEL)
    params = restored(tmp_path / "run", config).params
    params = jax.tree.map(np.asarray, params)
    blocks = [jax.tree.map(lambda a: a[0], block) for block in params["blocks"]]
    tokens = np.random.default_rng(0).integers(0, 53, (4, 20), np.int32)
    table = params["embed"]["tokens"][:53]
    params |= {"blocks": blocks, "embed": params["embed"] | {"tokens": table}}
    with torch.no_grad():
        want = gpt(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    np.testing.assert_allclose(plain_model.logits(MODEL, params, tokens), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shard_bytes", [write_folder.SHARD_BYTES, 10_000])
def test_a_round_trip_changes_no_bit(
    saved: tuple[Any, Path],
    tmp_path: Path,
    shard_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
):
    transformers = pytest.importorskip("transformers", reason=REASON)
    monkeypatch.setattr(write_folder, "SHARD_BYTES", shard_bytes)
    gpt, source = saved
    convert.import_model(source, tmp_path / "run")
    assert convert.export_model(tmp_path / "run", tmp_path / "back", None) == 0
    assert (tmp_path / "back" / hugging_face.INDEX).exists() == (shard_bytes == 10_000)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    weights = again.state_dict()
    assert weights.keys() == gpt.state_dict().keys()
    for name, value in gpt.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[name].numpy(), name)


def test_all_but_parameters_are_as_in_a_fresh_state(folder: Path, tmp_path: Path):
    """On a mesh of several stages too."""
    config = convert.import_model(folder, tmp_path / "run")
    config = runs.changed(config, mesh={"data": 3, "pipe": 2})
    state = restored(tmp_path / "run", config)
    mesh = make_mesh(config.mesh, jax.devices()[:6])
    fresh = init_state(make_spec(config, mesh), make_optimizer(config))
    chex.assert_trees_all_equal(state._replace(params=0), fresh._replace(params=0))


@pytest.mark.slow
def test_a_run_starts_from_imported_weights(folder: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    convert.import_model(folder, workdir)
    tokens = tmp_path / "tokens.bin"
    (np.arange(3000) ** 2 % 53).astype(np.uint16).tofile(tokens)
    config = runs.changed(
        load_config(workdir / "config.json"),
        mesh={"pipe": 2},
        plan={"token_slices": "uniform:2", "batch_slices": "uniform:1"},
        train={
            "num_steps": 2,
            "batch_size": 2,
            "log_every": 1,
            "eval_batches": 1,
            "sample_tokens": 0,
        },
        optim={"learning_rate": 0.0},
        data={"train": str(tokens)},
    )
    said = runs.run(config, workdir)
    assert "starting from imported weights" in said
    before = load_file(folder / "model.safetensors")
    assert convert.export_model(workdir, tmp_path / "out", None) == 2
    after = load_file(tmp_path / "out/model.safetensors")
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    path = folder / "model.safetensors"
    values = load_file(path) | {f"transformer.{n}": v for n, v in tensors.items()}
    save_file({n: v for n, v in values.items() if v is not None}, path)


FOREIGN = {"wte2.weight": np.zeros(3, np.float32)}
BROKEN = {
    "no folder": (lambda f: shutil.rmtree(f), r"config.json cannot be read .*Hugging Face"),
    "no settings": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "settings are a list": (lambda f: (f / "config.json").write_text("[]"), "it is no object"),
    "another model": (lambda f: edit(f, model_type="bert"), "of type bert: only gpt2, llama"),
    "another activation": (
        lambda f: edit(f, activation_function="relu"),
        "activation_function=relu, but the model here has gelu_new",
    ),
    "heads that don't divide": (lambda f: edit(f, n_head=5), "num_heads=5 does not divide"),
    "a size that is none": (lambda f: edit(f, n_layer="x"), "num_layers='x' must be of type int"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no model.safetensors",
    ),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:5000]
        ),
        "model.safetensors cannot be read",
    ),
    "missing": (
        lambda f: change(f, **{"h.1.mlp.c_fc.bias": None, "ln_f.bias": None}),
        "has no weight h.1.mlp.c_fc.bias, nor 1 others",
    ),
    "mis-shaped": (
        lambda f: change(f, **{"h.2.attn.c_proj.weight": np.zeros((24, 23), np.float32)}),
        r"h.2.attn.c_proj.weight as F32 \[24, 23\], but config.json asks for .* \[24, 24\]",
    ),
    "integers": (
        lambda f: change(f, **{"ln_f.bias": np.zeros(24, np.int64)}),
        r"ln_f.bias as I64 \[24\]",
    ),
    "foreign": (lambda f: change(f, **FOREIGN), "has a weight wte2.weight, which config.json does"),
    "a head of its own": (
        lambda f: save_file(
            load_file(f / "model.safetensors") | {"lm_head.weight": np.zeros((53, 24), np.float32)},
            f / "model.safetensors",
        ),
        "has a head lm_head.weight of its own",
    ),
    "an index of nothing": (
        lambda f: (f / hugging_face.INDEX).write_text('{"weight_map": 3}'),
        "has no weight_map",
    ),
    "an index that leads elsewhere": (
        lambda f: (f / hugging_face.INDEX).write_text('{"weight_map": {"wte.weight": "../x"}}'),
        "has no x: give a folder",
    ),
}


@pytest.mark.parametrize(("spoil", "sentence"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_imported_is_named_and_nothing_written(
    folder: Path, tmp_path: Path, spoil: Any, sentence: str
):
    spoil(folder)
    with pytest.raises(UserError, match=sentence):
        convert.import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_masks_and_a_head_that_is_the_embedding_do_not_matter(folder: Path, tmp_path: Path):
    path = folder / "model.safetensors"
    values = {n.removeprefix("transformer."): v for n, v in load_file(path).items()}
    mask = np.ones((1, 1, 20, 20), np.uint8)
    save_file(values | {"h.0.attn.bias": mask, "lm_head.weight": values["wte.weight"]}, path)
    convert.import_model(folder, tmp_path / "run")
    tokens = zarr_files.read_array(tmp_path / "run/checkpoints/0/params/embed/tokens")
    np.testing.assert_array_equal(tokens, values["wte.weight"])


def test_short_formats_become_float32(folder: Path, tmp_path: Path):
    import ml_dtypes

    path = folder / "model.safetensors"
    values = {n: v.astype(ml_dtypes.bfloat16) for n, v in load_file(path).items()}
    save_file(values, path)
    convert.import_model(folder, tmp_path / "run")
    tokens = zarr_files.read_array(tmp_path / "run/checkpoints/0/params/embed/tokens")
    np.testing.assert_array_equal(tokens, values["transformer.wte.weight"].astype(np.float32))


def test_folders_that_hold_something_stay_as_they_are(folder: Path, tmp_path: Path):
    run, out = tmp_path / "run", tmp_path / "out"
    convert.import_model(folder, run)
    with pytest.raises(UserError, match=rf"--workdir={run} is not empty"):
        convert.import_model(folder, run)
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(UserError, match=rf"--to={out} is not empty"):
        convert.export_model(run, out, None)
    assert [p.name for p in out.iterdir()] == ["mine"]
    with pytest.raises(UserError, match=r"--step=3 is not in .*these steps, 0\."):
        convert.export_model(run, tmp_path / "new", 3)
    with pytest.raises(UserError, match=r"has no sound checkpoint \(it has none\)"):
        convert.export_model(out, tmp_path / "new", None)
    (run / "checkpoints/0/params/norm/scale/0").write_bytes(b"short")
    with pytest.raises(UserError, match=r"no sound checkpoint \(0: params/norm/scale/0 has 5"):
        convert.export_model(run, tmp_path / "new", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "out", "run"]


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    convert.import_model(folder, tmp_path / "run")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(UserError, match=re.escape(f"cannot write to --workdir={tmp_path}/new")):
            convert.import_model(folder, tmp_path / "new")
        with pytest.raises(UserError, match=re.escape(f"cannot write --to={tmp_path}/out")):
            convert.export_model(tmp_path / "run", tmp_path / "out", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "run"]


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path):
    """There and back; a mistake is one sentence."""
    run, back = tmp_path / "run", tmp_path / "back"

    def convert_by(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/convert.py", *args]
        return subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)

    done = convert_by("import", f"--from={folder}", f"--workdir={run}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 layers, width 24, 3 heads, vocabulary 53, as step 0" in done.stdout
    further = f"--workdir={run} --config.data.train=TOKENS --config.optim.learning-rate=5e-05"
    assert f"and no tokenizer; train it further with\n    python launch/multihost.py {further}" in (
        done.stdout
    )
    assert load_config(run / "config.json").optim.learning_rate == 5e-5
    assert load_config(run / "config.json").model == MODEL
    done = convert_by("export", f"--workdir={run}", f"--to={back}", "--step=0")
    assert (done.returncode, done.stderr) == (0, "")
    first, load = done.stdout.splitlines()
    assert first.startswith(f"{back} has the weights of step 0, and no tokenizer: ")
    assert load.strip() == f"transformers.GPT2LMHeadModel.from_pretrained('{back}')"
    before, after = (load_file(f / "model.safetensors") for f in (folder, back))
    chex.assert_trees_all_equal(after, before)
    done = convert_by("export", f"--workdir={run}", f"--to={back}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --to={back} is not empty: choose a folder that is new.\n"


def test_the_tokenizer_goes_along(folder: Path, tmp_path: Path):
    """That of the run's settings, or another one that is named."""
    run = tmp_path / "run"
    convert.import_model(folder, run)
    tokens = {"a": 0, "b": 1, "<|endoftext|>": 2}
    path = tmp_path / "own.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="a")).save(str(path))
    config = load_config(run / "config.json")
    write_config(runs.changed(config, data={"tokenizer": str(path)}), run)
    convert.export_model(run, tmp_path / "own", None)
    assert json.loads((tmp_path / "own" / "tokenizer.json").read_text())["model"]["vocab"] == tokens
    told = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    assert (told["model_max_length"], told["eos_token"]) == (20, "<|endoftext|>")

    with pytest.raises(UserError, match=r"--tokenizer=bytes has 256 tokens, but the model has 53"):
        convert.export_model(run, tmp_path / "other", None, "bytes")
    path.unlink()
    with pytest.raises(UserError, match=r"config.data.tokenizer=.*own.json cannot be read"):
        convert.export_model(run, tmp_path / "other", None)
    assert not (tmp_path / "other").exists()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_can_be_read_as_usual_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = os.umask(0o022)
    try:
        convert.import_model(folder, tmp_path / "run")
        convert.export_model(tmp_path / "run", tmp_path / "out", None)
        monkeypatch.setattr(write_folder, "SHARD_BYTES", 4000)
        made = tmp_path / "shards"
        made.mkdir()
        write_folder.write_model(made, gpt2.ADAPTER, MODEL, reading(tmp_path))
    finally:
        os.umask(before)
    for written in (tmp_path / "run", tmp_path / "out", made):
        files = [path for path in written.rglob("*") if path.is_file()]
        assert {mode(path) for path in files} == {0o644}
    os.umask(0o077)
    try:
        convert.export_model(tmp_path / "run", tmp_path / "own", None)
    finally:
        os.umask(before)
    assert {mode(path) for path in (tmp_path / "own").iterdir()} == {0o600}


def reading(folder: Path) -> Callable[[str], np.ndarray]:
    checkpoint = folder / "run" / "checkpoints" / "0"
    shapes = {weight.name: weight.shape for weight in gpt2.weights_of(MODEL)}
    return lambda name: read_array(checkpoint, f"params/{name}", shapes[name])


@pytest.mark.parametrize(
    ("end", "told_in"),
    [("</s>", "config.json"), ("</s>", "tokenizer_config.json"), ("<|endoftext|>", None)],
)
def test_tokenizer_and_end_are_kept_there_and_back(
    end: str, told_in: str | None, folder: Path, tmp_path: Path
):
    """Also where another token has a usual name for the end."""
    tokens = {"a": 0, "\u00fc": 1, "<|end_of_text|>": 2, end: 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="a"))
    made.save(str(folder / "tokenizer.json"))
    if told_in == "config.json":
        edit(folder, eos_token_id=3)
    elif told_in:
        (folder / told_in).write_text(json.dumps({"eos_token": {"content": end}}))
    number = tokens[end]
    config = convert.import_model(folder, tmp_path / "run")
    shutil.move(folder, tmp_path / "moved")
    assert (config.data.end_token, config.data.separator) == (end, None)
    tokenizer = open_tokenizer("--tokenizer", config.data.tokenizer, config.data.end_token)
    assert (tokenizer.end, tokenizer.vocab_size) == (number, 4)
    convert.export_model(tmp_path / "run", tmp_path / "out", None)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["eos_token_id"], told["bos_token_id"]) == (number, number)
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert told["eos_token"] == end
    assert told.get("unk_token") == (end if end == "<|endoftext|>" else None)
    kept = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert kept.get_vocab() == tokens
    again = convert.import_model(tmp_path / "out", tmp_path / "again")
    assert again.data.end_token == end


def test_the_end_is_kept_without_a_tokenizer(folder: Path, tmp_path: Path):
    """Ids that the model does not have are not."""
    for given, kept in ((53, None), (-1, None), ("x", None), (True, None), (7, 7), ([60, 9], 9)):
        edit(folder, eos_token_id=given)
        assert hugging_face.read_end(hugging_face.read_settings(folder), 53) == kept
    config = convert.import_model(folder, tmp_path / "run")
    assert (config.data.tokenizer, config.data.separator) == ("bytes", 9)
    convert.export_model(tmp_path / "run", tmp_path / "out", None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [60, 9]


def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path, tmp_path: Path):
    train_bpe(["a text"], 300).save(str(folder / "tokenizer.json"))
    with pytest.raises(
        UserError, match=r"--from=.*tokenizer.json has .* but the model has 53: rem"
    ):
        convert.import_model(folder, tmp_path / "run")
    (folder / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"--from=.*tokenizer.json cannot be read"):
        convert.import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_export_says_that_it_takes_an_older_checkpoint(folder: Path, tmp_path: Path):
    convert.import_model(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "7").mkdir()
    args = ["export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}"]
    command = [sys.executable, "launch/convert.py", *args]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert re.fullmatch(
        r"warning: .* damaged \(7: manifest.json is missing\): the one of step 0 is taken, which "
        r"is older\.\n",
        done.stderr,
    )
    assert "has the weights of step 0" in done.stdout


@pytest.mark.slow
def test_a_learnt_tokenizer_is_loaded_by_transformers(folder: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason=REASON)
    made, run = train_bpe(["the quick brown fox " * 9], 270), tmp_path / "run"
    config = ModelConfig(1, 8, 1, vocab_size=made.get_vocab_size(), seq_len=20)
    params = jax.device_get(transformer.init(config, jax.random.key(0)))
    values = {
        jax.tree_util.keystr(where, simple=True, separator="/"): np.array(value)
        for where, value in jax.tree.leaves_with_path(params)
    }
    (tmp_path / "there").mkdir()
    write_folder.write_model(tmp_path / "there", gpt2.ADAPTER, config, values.__getitem__)
    convert.import_model(tmp_path / "there", run)
    made.save(str(tmp_path / "own.json"))
    convert.export_model(run, tmp_path / "out", None, str(tmp_path / "own.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the quick, Grüße <|endoftext|>fox"
    assert loaded(text)["input_ids"] == made.encode(text).ids
    assert loaded.decode(made.encode(text).ids) == text
    assert loaded.eos_token_id == made.token_to_id("<|endoftext|>")
    assert len(loaded) == config.vocab_size


def test_a_killed_export_does_not_block_the_next(folder: Path, tmp_path: Path):
    run, out, saving = tmp_path / "run", tmp_path / "out", tmp_path / "out.saving"
    convert.import_model(folder, run)
    saving.mkdir()
    (saving / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (saving / "tokenizer.json").write_bytes(b"half")
    descriptor = os.open(saving, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as an export that is still at work
    with pytest.raises(UserError, match=rf"another export writes --to={out}: wait for its end"):
        convert.export_model(run, out, None)
    assert len(list(saving.iterdir())) == 2
    os.close(descriptor)
    (saving / "mine").write_text("")
    with pytest.raises(UserError, match=r"out\.saving, where .* has files that are not of an exp"):
        convert.export_model(run, out, None)
    (saving / "mine").unlink()
    assert convert.export_model(run, out, None) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert not saving.exists()


SETTINGS = {"n_layer": 10**6, "vocab_size": 10**9, "n_positions": 2**31 - 1, "n_embd": 3 * 2**20}


@pytest.mark.parametrize(("name", "value"), SETTINGS.items(), ids=SETTINGS)
def test_settings_that_ask_for_more_than_there_is(
    folder: Path, tmp_path: Path, name: str, value: int
):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {name: value}))
    before = time.monotonic()
    with bounded_memory(2**28), pytest.raises(UserError, match=r"config\.json asks for"):
        convert.import_model(folder, tmp_path / "run")
    assert time.monotonic() - before < 30
    assert not (tmp_path / "run").exists()


def test_an_import_follows_no_link_out_of_the_folder(folder: Path, tmp_path: Path):
    """But those of Hugging Face's cache."""
    (folder / "tokenizer.json").write_text("{}")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        outside = tmp_path / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)
        with pytest.raises(UserError, match=rf"has {name} as a link to {outside}, out of that"):
            convert.import_model(folder, tmp_path / "run")
        outside.rename(folder / name)
    (folder / "tokenizer.json").unlink()
    index = {"weight_map": {"wte.weight": "../outside.safetensors", "x": 5000 * "a", "y": "a\0b"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"has no .*: give a folder"):
        convert.import_model(folder, tmp_path / "run")
    (folder / "model.safetensors.index.json").unlink()
    snapshot = tmp_path / "models--x" / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    folder.rename(tmp_path / "models--x" / "blobs")
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    convert.import_model(snapshot, tmp_path / "run")


def test_an_import_executes_nothing(folder: Path, tmp_path: Path):
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'executed')!r}).touch()\n"
    (folder / "modeling.py").write_text(code)
    named = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "trust_remote_code": True}
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | named))
    tokens = {"a": 0, "b": 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="a"))
    made.save(str(folder / "tokenizer.json"))
    named |= {"auto_map": {"AutoTokenizer": ["modeling.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    convert.import_model(folder, tmp_path / "run")
    assert not (tmp_path / "executed").exists()
