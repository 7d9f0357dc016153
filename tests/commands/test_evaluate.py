"""The loss of a model on data, against the plain model on each window."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from support import reference, runs
from support.marks import slow
from tpipe_jax import load
from tpipe_jax.commands.evaluate import evaluate
from tpipe_jax.commands.trained_model import Trained
from tpipe_jax.config.settings import BYTES, Config, MeshConfig, ModelConfig
from tpipe_jax.data.sources import Share, open_shares
from tpipe_jax.data.tokenizer import bytes_to_letters, train_bpe
from tpipe_jax.devices.mesh import make_mesh, shardings
from tpipe_jax.errors import UserError
from tpipe_jax.model import transformer
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.pipeline.spec import make_spec

pytestmark = pytest.mark.usefixtures("short_flags")

MODEL = ModelConfig(num_layers=3, d_model=16, num_heads=2, vocab_size=29, seq_len=8)
MESHES = [slow(MeshConfig()), MeshConfig(pipe=2), slow(MeshConfig(data=2, pipe=2))]


@pytest.mark.parametrize("num_tokens", [slow(2), slow(9), slow(10), 60])
@pytest.mark.parametrize("mesh_config", MESHES, ids=str)
def test_every_token_but_the_first_counts_once(
    tmp_path: Path, num_tokens: int, mesh_config: MeshConfig
):
    """In windows that begin anew; the last one and the last batch may be short."""
    tokens = np.random.default_rng(0).integers(0, 29, num_tokens + 3, np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    config = runs.changed(Config(model=MODEL, mesh=mesh_config), train={"batch_size": 4})
    params = transformer.init(MODEL, jax.random.key(1))
    params["embed"] = jax.tree.map(lambda a: 20 * a, params["embed"])
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.num_devices])
    staged = reference.to_stages(params, mesh)
    on_mesh = jax.device_put(staged, shardings(mesh, param_specs(MODEL, len(staged["blocks"]))))
    trained = Trained(make_spec(config, mesh), on_mesh, 3)
    [(source, _, _)] = open_shares("--data", str(tmp_path / "tokens.bin"), 29, config.data)
    steps: list[tuple[int, int]] = []
    got = evaluate(
        trained,
        [Share(source, range(2, num_tokens + 2))],
        lambda done, total: steps.append((done, total)),
    )

    own = tokens[2 : num_tokens + 2].astype(np.int32)
    losses = [
        (len(part) - 1) * float(reference.loss(MODEL, params, jnp.asarray(part[None])))
        for part in (own[i : i + 9] for i in range(0, num_tokens - 1, 8))
    ]
    assert got.num_tokens == num_tokens - 1
    assert got.loss == pytest.approx(sum(losses) / (num_tokens - 1), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.loss))
    assert got.bits_per_byte is None
    assert steps[-1] == (len(losses), len(losses))


@pytest.mark.slow
def test_what_a_run_holds_out(tmp_path: Path):
    """As the run has evaluated it, if it does so on all of it; and bytes have bits."""
    config = runs.small_config(tmp_path)
    text = Path(config.data.train).read_bytes()
    held_out = len(text) - int(0.1 * len(text))
    batches = (len(text) - held_out - 1) // 16 // 4  # whole batches of whole windows
    config = runs.changed(config, train={"eval_batches": batches, "eval_every": 6})
    assert config.model.vocab_size == BYTES
    runs.run(config, tmp_path / "run")
    expected = runs.metrics(tmp_path / "run")[-1]["eval_loss"]

    part = tmp_path / "part.txt"
    part.write_bytes(text[held_out : held_out + batches * 64 + 1])
    command = [sys.executable, "launch/evaluate.py", f"--workdir={tmp_path / 'run'}"]
    args = [f"--data={part}", "--mesh.pipe=2", "--batch-size=3"]
    done = subprocess.run([*command, *args], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    loss, perplexity, bits = map(float, re.findall(r"\d+\.\d+", line))
    assert loss == pytest.approx(expected, abs=2e-4)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(loss / math.log(2), abs=2e-4)
    assert line.endswith(f"of {batches * 64} tokens after step 6")

    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"of {len(text) - held_out - 1} tokens after step 6" in done.stdout


@pytest.mark.slow
def test_tokens_of_another_tokenizer(tmp_path: Path):
    runs.run(runs.changed(runs.small_config(tmp_path), train={"num_steps": 1}), tmp_path / "run")
    trained = load(tmp_path / "run").trained
    train_bpe(["a text"], 258).save(str(tmp_path / "small.json"))  # of which some are not there
    np.array([97, 255, 97] * 9, np.uint16).tofile(tmp_path / "tokens.bin")
    data = dataclasses.replace(trained.config.data, tokenizer=str(tmp_path / "small.json"))
    config = dataclasses.replace(trained.config, data=data)
    shares = open_shares("--data", str(tmp_path / "tokens.bin"), 256, data)
    with_bytes = evaluate(trained.with_config(config), shares)
    assert with_bytes.num_bytes == with_bytes.num_tokens  # a byte each
    letters = {letter: n + (n >= 97) for n, letter in enumerate(bytes_to_letters())}
    swallowing = tokenizers.Tokenizer(models.BPE(letters | {"<x>": 97}, []))
    swallowing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    swallowing.decoder = decoders.ByteLevel()
    swallowing.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    swallowing.save(str(tmp_path / "swallowing.json"))
    data = dataclasses.replace(data, tokenizer=str(tmp_path / "swallowing.json"))
    config = dataclasses.replace(config, data=data)
    assert evaluate(trained.with_config(config), shares).bits_per_byte is None
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.decoder = decoders.ByteLevel()
    words.save(str(tmp_path / "words.json"))
    data = dataclasses.replace(data, tokenizer=str(tmp_path / "words.json"))
    config = dataclasses.replace(config, data=data)
    with pytest.raises(UserError, match=r"words.json has 1 tokens, but the data have token id 255"):
        evaluate(trained.with_config(config), shares)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    runs.run(runs.changed(runs.small_config(folder), train={"num_steps": 1}), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--data=nowhere"], "error: --data=nowhere does not exist"),
        (["--batch-size=0"], "error: --batch-size=0 must be at least 1"),
        (["--data={one}"], "has a single token: give two at least"),
        (["--tokenizer=nowhere.json"], "=nowhere.json cannot be read"),
    ],
)
def test_mistakes_are_answered(tmp_path: Path, workdir: Path, args: list[str], sentence: str):
    (tmp_path / "one.txt").write_text("1")
    args = [arg.format(one=tmp_path / "one.txt") for arg in args]
    command = [sys.executable, "launch/evaluate.py", f"--workdir={workdir}", *args]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
