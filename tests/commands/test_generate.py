"""Continuing texts on the stages' caches: the same tokens as the plain model, and transformers."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tpipe_jax
from support import reference, runs
from support.marks import slow
from tpipe_jax.commands.generate import Generator, chooser, until_end
from tpipe_jax.commands.prompts import encode_prompt, ends_of, read_prompt
from tpipe_jax.commands.trained_model import load
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig, PlanConfig, PrecisionConfig
from tpipe_jax.data.tokenizer import open_tokenizer, train_bpe
from tpipe_jax.devices.mesh import make_mesh, shardings
from tpipe_jax.errors import UserError
from tpipe_jax.interop import convert
from tpipe_jax.interop.gpt2 import ADAPTER
from tpipe_jax.interop.write_folder import write_model
from tpipe_jax.model import reference as plain_model
from tpipe_jax.model import transformer
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.model.transformer import num_params
from tpipe_jax.pipeline.spec import make_spec

MODEL = ModelConfig(num_layers=3, d_model=16, num_heads=2, vocab_size=29, seq_len=8)
PLAN = PlanConfig()
MESHES = [slow(MeshConfig()), MeshConfig(data=2, pipe=2), slow(MeshConfig(pipe=3, model=2))]


def params_of(config: ModelConfig) -> Any:
    """Large enough for what came earlier to matter in the draws, which a test below sees to."""
    params = transformer.init(config, jax.random.key(1))
    return jax.tree.map(lambda a: 25 * a if a.ndim > 1 else a, params)


def generator(
    mesh_config: MeshConfig, config: ModelConfig = MODEL, plan: PlanConfig = PLAN
) -> Generator:
    whole = Config(config, mesh_config, plan, precision=PrecisionConfig("float32"))
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.num_devices])
    staged = reference.to_stages(params_of(config), mesh, plan.num_chunks)
    specs = param_specs(MODEL, len(staged["blocks"]))
    return Generator(make_spec(whole, mesh), jax.device_put(staged, shardings(mesh, specs)))


def plainly(prompt: list[int], num_tokens: int, choose: Any, config: ModelConfig = MODEL):
    """The same by forward passes over all that is read, without caches."""
    params, seq_len, seen = params_of(config), config.seq_len, list(prompt)
    logits_of = jax.jit(lambda tokens: plain_model.logits(config, params, tokens))
    chosen = []
    for _ in range(num_tokens):
        padded = np.zeros((1, seq_len), np.int32)
        padded[0, : len(seen)] = seen
        chosen.append(choose(np.asarray(logits_of(padded))[0, len(seen) - 1]))
        seen.append(chosen[-1])
        if len(seen) > seq_len:
            seen = seen[-(seq_len // 2) :]
    return chosen


def test_what_came_earlier_matters():
    """The same last tokens at the same positions after another one."""
    params = params_of(MODEL)
    one, other = (
        plain_model.logits(MODEL, params, np.array([[t, 3, 1, 4]]))[0, -1] for t in (2, 9)
    )
    assert np.abs(one - other).max() > 0.3 * np.abs(one).max()


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_draws_as_the_plain_model_does(mesh: MeshConfig):
    """Beyond the model's length too."""
    made = generator(mesh)
    for prompt in ([3], [3, 1, 4], [7, 7, 2, 9, 1, 4, 4, 28]):
        got = list(itertools.islice(made.tokens_after(prompt, chooser(4, seed=5)), 14))
        assert got == plainly(prompt, 14, chooser(4, seed=5))
        assert len(set(got)) >= 3


@pytest.mark.slow
def test_draws_through_the_chunks_of_each_stage():
    """As a run does under the schedule interleaved."""
    config = replace(MODEL, num_layers=7)
    made = generator(MeshConfig(pipe=3), config, PlanConfig(schedule="interleaved", chunks=2))
    got = list(itertools.islice(made.tokens_after([3, 1, 4], chooser(4, seed=5)), 14))
    assert got == plainly([3, 1, 4], 14, chooser(4, seed=5), config)
    assert len(set(got)) >= 3


def test_a_prompt_of_several_parts():
    """The last part begins before the one before it ends where it would reach beyond the caches."""
    config = replace(MODEL, seq_len=90)
    made = generator(MeshConfig(pipe=2), config)
    for length in (63, 64, 65, 89, 90):
        prompt = (np.arange(length) * 7 % 29).tolist()
        got = list(itertools.islice(made.tokens_after(prompt, chooser(0)), 4))
        assert got == plainly(prompt, 4, chooser(0), config), length


def test_choices():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert {chooser(0)(logits) for _ in range(20)} == {0}
    least = chooser(1, top_p=0, seed=1)
    assert {least(logits[::-1]) for _ in range(50)} == {3}
    half = chooser(1, top_p=0.5, seed=1)
    assert {half(logits) for _ in range(50)} == {0}
    most = chooser(1, top_p=0.79, seed=1)
    assert {most(logits) for _ in range(200)} == {0, 1}
    draw = chooser(1, seed=1)
    counts = np.bincount([draw(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    hot, cold = chooser(100, seed=1), chooser(0.1, seed=1)
    assert {hot(logits) for _ in range(100)} == {0, 1, 2, 3}
    assert [cold(logits) for _ in range(50)].count(0) > 45


def test_choices_among_the_most_likely():
    """With `top_p` too: among these, their probabilities again sum to 1."""
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    for top_k, top_p, expected in (
        (1, 1.0, {1}),
        (2, 1.0, {1, 3}),
        (9, 1.0, {0, 1, 2, 3}),
        (2, 0.57, {1}),  # 0.4 of 0.7
        (2, 0.58, {1, 3}),
    ):
        choose = chooser(1, top_p, 1, top_k)
        assert {choose(logits) for _ in range(200)} == expected, (top_k, top_p)
    equal = chooser(1, seed=1, top_k=2)
    assert {equal(np.zeros(4)) for _ in range(100)} == {0, 1}


def test_generation_ends_before_the_end_of_the_document():
    assert list(until_end(iter([5, 6, 7, 8]), {7, 9}, 10)) == [5, 6]
    assert list(until_end(iter([5, 6, 7, 8]), {7}, 1)) == [5]
    assert list(until_end(itertools.count(), set(), 3)) == [0, 1, 2]


def test_a_prompt_that_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("Grüße\n".encode())
    assert read_prompt(tmp_path / "a.txt") == "Grüße\n"
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(UserError, match=r"^--prompt-file=.*a.txt is not UTF-8 at byte 2: save it"):
        read_prompt(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"^--prompt-file=.* cannot be read \(No such file"):
        read_prompt(tmp_path / "b.txt")
    text = b"Gr\xfc".decode("utf-8", "surrogateescape")  # as an argument of a command is read
    with pytest.raises(UserError, match=r"^--prompt is not UTF-8: write it in UTF-8\.$"):
        encode_prompt("--prompt", text, open_tokenizer("--tokenizer", "bytes"), ModelConfig(), "")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a model of bytes, made without torch."""
    config = ModelConfig(num_layers=1, d_model=16, num_heads=2, seq_len=40)
    params = params_of(config)
    values = {
        jax.tree_util.keystr(where, simple=True, separator="/"): np.array(value)
        for where, value in jax.tree.leaves_with_path(params)
    }
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "made").mkdir()
    write_model(folder / "made", ADAPTER, config, values.__getitem__)
    convert.import_model(folder / "made", folder / "run")
    return folder / "run"


def test_it_stops_at_the_separator_of_the_run(workdir: Path, tmp_path: Path):
    """Unless it should go on."""
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    whole = tpipe_jax.load(copy, devices=jax.devices()[:1]).generate("ab", 9, 4, seed=2)
    tokenizer = open_tokenizer("--tokenizer", "bytes")
    made = Generator(*tpipe_jax.load(copy, devices=jax.devices()[:1]).trained[:2])
    tokens = list(itertools.islice(made.tokens_after(list(b"ab"), chooser(4, seed=2)), 9))
    assert "".join(tokenizer.stream(tokens)) == whole
    assert tokens[5] not in tokens[:5]
    content = json.loads((copy / "config.json").read_text())
    content["data"]["separator"] = tokens[5]
    (copy / "config.json").write_text(json.dumps(content))
    assert ends_of(copy, tokenizer) == ends_of(copy, None) == {tokens[5]}
    model = tpipe_jax.load(copy, devices=jax.devices()[:1])
    assert model.generate("ab", 9, 4, seed=2) == "".join(tokenizer.stream(tokens[:5]))
    assert model.generate("ab", 9, 4, seed=2, stop_at_end=False) == whole
    ends = train_bpe(["a text"], 300)
    ends.save(str(copy / "t.json"))
    with_end = open_tokenizer("--tokenizer", str(copy / "t.json"))
    assert ends_of(copy, with_end) == {tokens[5], with_end.end}


def test_several_samples_of_a_prompt_in_a_file(workdir: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("The quick")
    command = [sys.executable, "-m", "tpipe_jax", "generate", f"--workdir={workdir}"]
    args = [f"--prompt-file={tmp_path / 'a.txt'}", "--num-samples=3", "--max-tokens=12"]
    args += ["--temperature=9", "--top-k=100"]
    done = subprocess.run([*command, *args], cwd=runs.ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    samples = done.stdout.decode().split("\n---\nThe quick")
    assert len(set(samples)) == len(samples) == 3
    assert samples[0].startswith("The quick")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A GPT2LMHeadModel, and a workdir with its weights."""
    reason = 'needs torch and transformers: pip install -e ".[interop]"'
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 256, "n_positions": 80}
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("gpt2")
    made.save_pretrained(folder / "there")
    convert.import_model(folder / "there", folder / "run")
    return made, folder / "run"


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(gpt2: tuple[Any, Path]):
    torch = pytest.importorskip("torch")
    made, workdir = gpt2
    prompt = list(b"The quick brown fox")
    want = made.generate(
        torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None
    )[0].tolist()
    out = run_launcher(workdir, "--prompt-ids=" + ",".join(map(str, prompt)), "--max-tokens=60")
    assert list(map(int, out.split())) == want
    assert len(set(want[len(prompt) :])) > 3


def run_launcher(workdir: Path, *args: str) -> str:
    command = [sys.executable, "launch/generate.py", f"--workdir={workdir}", "--temperature=0"]
    done = subprocess.run([*command, *args], cwd=runs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_bytes_are_printed_as_text(gpt2: tuple[Any, Path]):
    _, workdir = gpt2
    prompt = "The quick"
    ids = run_launcher(workdir, "--prompt-ids=" + ",".join(map(str, prompt.encode())))
    text = run_launcher(workdir, f"--prompt={prompt}", "--mesh.pipe=2")
    assert text.startswith(prompt)
    expected = bytes(map(int, ids.split())).decode(errors="replace")
    assert text.rstrip("\n") == expected.rstrip("\n")


@pytest.mark.slow
def test_text_of_a_tokenizer(tmp_path: Path):
    """That the model has more tokens than its tokenizer does not matter."""
    path, source, workdir = tmp_path / "tokenizer.json", tmp_path / "made", tmp_path / "run"
    train_bpe(["Grüße, world! " * 9, "the quick brown fox"], 300).save(str(path))
    config = ModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=304, seq_len=40)
    params = params_of(config)
    values = {
        jax.tree_util.keystr(where, simple=True, separator="/"): np.array(value)
        for where, value in jax.tree.leaves_with_path(params)
    }
    source.mkdir()
    write_model(source, ADAPTER, config, values.__getitem__)
    convert.import_model(source, workdir)
    tokenizer = open_tokenizer("--tokenizer", str(path))
    prompt = tokenizer.encode("Grüße").tolist()
    ids = run_launcher(workdir, "--prompt-ids=" + ",".join(map(str, prompt)), "--max-tokens=20")
    text = run_launcher(workdir, f"--tokenizer={path}", "--prompt=Grüße", "--max-tokens=20")
    assert text.startswith("Grüße")
    expected = "".join(tokenizer.stream(map(int, ids.split())))
    assert text.rstrip("\n") == expected.rstrip("\n")

    command = [sys.executable, "launch/generate.py", f"--workdir={workdir}", "--prompt=x"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "of a tokenizer of 256 tokens, but the model has 304: give its own" in done.stderr


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--prompt="], "error: --prompt is empty: give at least one token, from 0 to 255."),
        ([], "error: give a text to continue, with either --prompt, --prompt-file or --prompt-ids"),
        (["--prompt=a", "--prompt-file=b"], "error: give a text to continue, with either --prompt"),
        (["--prompt=a", "--num-samples=2", "--temperature=0"], "--num-samples=2 would all be the"),
        (["--prompt-ids=3,x"], "error: --prompt-ids=3,x is no list of numbers, as 464,3290."),
        (["--prompt-ids=256"], "error: --prompt-ids has 256, which is no token: give at least"),
        (
            ["--prompt=" + 81 * "a"],
            "error: --prompt has 81 tokens, more than config.model.seq",
        ),
        (["--prompt=a", "--temperature=-1"], "error: --temperature=-1.0 must be at least 0"),
        (["--prompt=a", "--top-p=1.5"], "error: --top-p=1.5 must be between 0 and 1"),
        (["--prompt=a", "--mesh.model=3"], "config.mesh.model=3"),
        (["--prompt=a", "--step=7"], "error: --step=7 is not in"),
    ],
)
def test_mistakes_are_answered(gpt2: tuple[Any, Path], args: list[str], sentence: str):
    command = [sys.executable, "launch/generate.py", f"--workdir={gpt2[1]}", *args]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_parameters_alone_are_read(gpt2: tuple[Any, Path]):
    trained = load(gpt2[1], None, Config(mesh=MeshConfig(pipe=2)), jax.devices())
    assert trained.step == 0
    sizes = [a.size for a in jax.tree.leaves(trained.params)]
    assert sum(sizes) == num_params(trained.config.model)
    with pytest.raises(UserError, match="no sound checkpoint"):
        load(runs.ROOT, None, Config(), jax.devices())
