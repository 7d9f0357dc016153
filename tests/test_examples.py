"""The library, and the examples, as they are started and as short as they are promised to be."""

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import tpipe_jax
from support import runs
from tpipe_jax.commands.evaluate import evaluate
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig, PlanConfig, TrainConfig
from tpipe_jax.data.batches import open_held_out
from tpipe_jax.data.tokenizer import bytes_to_letters, hugging_face
from tpipe_jax.errors import UserError
from tpipe_jax.interop import convert, gpt2, llama
from tpipe_jax.interop.hugging_face import Adapter
from tpipe_jax.interop.write_folder import write_model
from tpipe_jax.model import reference, transformer
from tpipe_jax.planning.plan import Plan

EXAMPLES = sorted((runs.ROOT / "examples").glob("*.py"))
SMALL = ModelConfig(num_layers=2, d_model=16, num_heads=2, seq_len=16)
LEARNT = {"train_on_arrays": 1.25, "own_block": 2.5}  # at the end, from 4.6 and 5.5 nats


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path):
    """From another folder."""
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, str(path)]
    if path.stem == "longer_context":
        there = hugging_face_folder(tmp_path, llama.ADAPTER, replace(SMALL, family="llama"))[1]
        (tmp_path / "text.txt").write_text("one two three four five six seven. " * 200)
        command += [str(there), "text.txt", "longer"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if path.stem == "longer_context":
        found = re.search(
            r"16 tokens of context: (\S+) .*; 64 tokens, after 20 steps: (\S+)", done.stdout
        )
        assert found is not None, done.stdout
        assert float(found[2]) < float(found[1])
    elif path.stem in LEARNT:
        losses = re.findall(r"loss ([\d.]+) ", done.stdout)
        assert float(losses[-1]) < LEARNT[path.stem], done.stdout
    else:
        assert re.search(r"token slices .*\d+, \d+.*\npredicted step \d+ ms", done.stdout)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore:Proactor")
def test_the_notebook_runs(tmp_path: Path):
    """From data to pictures; it is kept without outputs."""
    path = runs.ROOT / "examples" / "quickstart.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    # A program of its own, since this process has devices already.
    program = (
        "import sys, nbformat; from nbclient import NotebookClient\n"
        "notebook = nbformat.read(sys.argv[1], as_version=4)\n"
        "NotebookClient(notebook, timeout=600, kernel_name='python3').execute()\n"
        "nbformat.write(notebook, 'done.ipynb')\n"
    )
    command = [sys.executable, "-c", program, path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs = [
        output
        for cell in nbformat.read(tmp_path / "done.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
    ]
    data = [output["data"] for output in outputs if "data" in output]
    assert any("Trained 150 steps" in each.get("text/plain", "") for each in data)
    assert sum("image/png" in each for each in data) == 3
    assert any("((1, 17, 256), " in each["text/plain"] for each in data)
    history = ast.literal_eval(next(e["text/plain"] for e in data if "'step'" in e["text/plain"]))
    assert history["eval_loss"] < 3.0


def small() -> Config:
    return Config(
        ModelConfig(num_layers=2, d_model=8, num_heads=2, vocab_size=11, seq_len=8),
        MeshConfig(pipe=2),
        PlanConfig("uniform:2", "uniform:1"),
        TrainConfig(batch_size=2, num_steps=2),
    )


def test_a_name_that_the_library_does_not_have():
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        tpipe_jax.missing  # noqa: B018


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (Plan(2, (2,), ((4, 2),)), "sequences of 6, but config.model.seq_len is 8"),
        (Plan(3, (2,), ((4, 4),)), "a number of stages of 3, but config.mesh.pipe is 2"),
        (Plan(2, (1,), ((4, 4),)), "a batch of 1, but config.train.batch_size"),
    ],
)
def test_a_plan_of_another_config_is_refused(plan: Plan, what: str):
    with pytest.raises(UserError, match=f"the plan is for {what}"):
        tpipe_jax.make_train_step(small(), plan, jax.devices()[:2])


def test_a_step_takes_arrays_of_numpy_and_of_jax():
    step = tpipe_jax.make_train_step(small(), devices=jax.devices()[:2])
    rows = np.random.default_rng(0).integers(0, 11, (2, 9))
    kinds = rows, jnp.array(rows), rows.tolist()
    losses = [float(step(step.init(), own)[1]["loss"]) for own in kinds]
    assert losses[0] == losses[1] == losses[2] == pytest.approx(np.log(11), abs=0.1)
    with pytest.raises(UserError, match=r"rows of shape \(2, 8\) must be of \(2, 9\)"):
        step(step.init(), rows[:, :8])
    with pytest.raises(UserError, match=r"rows\[0, 0\]=.* is no token: ids are from 0 to 10"):
        step(step.init(), rows + 11)
    with pytest.raises(UserError, match="rows of type float32 must be int32"):
        step(step.init(), jnp.array(rows, jnp.float32))


@pytest.mark.slow
def test_a_run_is_trained_and_loaded(tmp_path: Path):
    """And evaluated on what it holds out, as it has evaluated itself."""
    config = runs.changed(runs.small_config(tmp_path), train={"eval_batches": 1, "batch_size": 2})
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "eval.txt").write_text(text[: 2 * 16 + 1])
    (tmp_path / "text.txt").write_text(text[33:])
    config = runs.changed(config, data={"eval": str(tmp_path / "eval.txt")})
    history = tpipe_jax.train(config, str(tmp_path / "run"), jax.devices()[:2])
    assert history == runs.metrics(tmp_path / "run")
    assert [line["step"] for line in history] == [1, 2, 3, 4, 5, 6]
    trained = tpipe_jax.load(str(tmp_path / "run"), config=Config(mesh=MeshConfig(pipe=2)))
    assert (trained.step, trained.config.data.train) == (6, config.data.train)
    _, shares = open_held_out(trained.config)
    expected = runs.metrics(tmp_path / "run")[-1]["eval_loss"]
    assert evaluate(trained.trained, shares).loss == pytest.approx(expected, rel=1e-5)
    held_out = trained.evaluate()
    assert held_out.loss == pytest.approx(expected, rel=1e-5)
    assert trained.evaluate(tmp_path / "eval.txt").num_tokens == held_out.num_tokens == 32
    with pytest.raises(UserError, match=r"data=.* does not exist"):
        trained.evaluate(tmp_path / "missing.txt")


def hugging_face_folder(folder: Path, adapter: Adapter, config: ModelConfig) -> tuple[Any, Path]:
    """Fresh parameters, larger than usual, and the folder `there` that they are in."""
    params = jax.device_get(transformer.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda a: 8 * a if a.ndim > 1 else a, params)
    values = {
        jax.tree_util.keystr(where, simple=True, separator="/"): np.array(value)
        for where, value in jax.tree.leaves_with_path(params)
    }
    (folder / "there").mkdir()
    write_model(folder / "there", adapter, config, values.__getitem__)
    return params, folder / "there"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The parameters of a model, and the workdir of a run that starts from them."""
    config, folder = replace(SMALL, seq_len=70), tmp_path_factory.mktemp("imported")
    params, there = hugging_face_folder(folder, gpt2.ADAPTER, config)
    convert.import_model(there, folder / "run")
    return params, folder / "run"


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, pipe=2)], ids=str)
def test_logits_are_those_of_the_plain_model(imported: tuple[Any, Path], mesh: MeshConfig):
    """Of 65 to 70 tokens, which are read in two parts, and of more rows than data shards."""
    params, workdir = imported
    model = tpipe_jax.load(workdir, config=Config(mesh=mesh), devices=jax.devices())
    tokens = np.random.default_rng(0).integers(0, 256, (3, 70))
    for length in (1, 65, 70):
        expected = reference.logits(model.config.model, params, jnp.array(tokens[:, :length]))
        np.testing.assert_allclose(model.logits(tokens[:, :length]), expected, atol=2e-5)
    np.testing.assert_allclose(model.logits(list(tokens[0])), expected[0], atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "what"),
    [
        ([[0, 256]], "tokens must be from 0 to 255"),
        ([[-1]], "tokens must be from 0 to 255"),
        ([[0] * 71], r"of shape \(1, 71\) and type int64 must be whole numbers \[B, L\]"),
        ([], r"of shape \(1, 0\)"),
        ([0.5], "type float64 must be whole"),
    ],
)
def test_tokens_that_the_model_has_not(imported: tuple[Any, Path], tokens: Any, what: str):
    with pytest.raises(UserError, match=what):
        tpipe_jax.load(imported[1], devices=jax.devices()[:1]).logits(tokens)


def test_a_loaded_model_continues_text(imported: tuple[Any, Path]):
    """As its logits say."""
    model = tpipe_jax.load(imported[1], devices=jax.devices()[:1])
    text = model.generate("The", max_tokens=5, temperature=0)
    tokens = list(b"The")
    for _ in range(5):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    assert text == bytes(tokens[3:]).decode(errors="replace")
    assert model.generate("The", max_tokens=9, seed=1) != model.generate(
        "The", max_tokens=9, seed=2
    )
    with pytest.raises(UserError, match="is empty"):
        model.generate("")


def test_a_block_that_would_not_be_used_is_refused(imported: tuple[Any, Path]):
    named = Config(ModelConfig(block="block.py:B"))
    with pytest.raises(UserError, match=r"block=block.py:B would not be used, since the model in"):
        tpipe_jax.load(imported[1], config=named, devices=jax.devices()[:1])


@pytest.mark.slow
def test_a_loaded_model_is_saved_for_transformers(imported: tuple[Any, Path], tmp_path: Path):
    """With its tokenizer, here of bytes; both give what the model here gives."""
    reason = 'needs torch and transformers: pip install -e ".[interop]"'
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    model = tpipe_jax.load(imported[1], devices=jax.devices()[:1])
    model.save(tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "Grüße, \n\tworld\x00  \u2603!"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.model_max_length == 70
    made = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        there = made(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(model.logits(ids), there, atol=1e-4)
    with pytest.raises(UserError, match="is not empty"):
        model.save(tmp_path / "saved")


def test_the_letters_of_bytes_are_those_of_the_library():
    """Their alphabet is without order: so is ours, beside the rule for printable bytes."""
    letters = bytes_to_letters()
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    assert len(set(letters)) == 256
    encoder = hugging_face("--tokenizer", "bytes")
    for text in ("\x00\n azAZ09~\x7f", "é\xad\xa0ÿ", "\u2603\U0001f600"):
        assert encoder.encode(text).ids == list(text.encode())


@pytest.mark.slow
def test_a_block_of_a_checkpoint_is_loaded_only_by_name(tmp_path: Path):
    path = runs.ROOT / "examples" / "own_block.py"
    block = f"{path}:LlamaBlock"
    config = runs.changed(
        runs.small_config(tmp_path), train={"num_steps": 1}, model={"block": block}
    )
    runs.run(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"is code and is only loaded if you name it.*own_block.py"):
        tpipe_jax.load(tmp_path / "run", devices=jax.devices()[:1])
    copy = tmp_path / "copy.py"
    copy.write_text(path.read_text())
    named = Config(ModelConfig(block=f"{copy}:LlamaBlock"))
    model = tpipe_jax.load(tmp_path / "run", config=named, devices=jax.devices()[:1])
    assert model.config.model.block == f"{copy}:LlamaBlock"
    for words in (["evaluate"], ["generate", "--prompt=1", "--max-tokens=2"]):
        command = [sys.executable, "-m", "tpipe_jax", *words, f"--workdir={tmp_path / 'run'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"then add --config.model.block={block}." in done.stderr
        command += [f"--config.model.block={copy}:LlamaBlock"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
