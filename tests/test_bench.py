"""What the GPU bench computes, as far as a CPU can tell."""

import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
import several
from tpipe_jax import model
from tpipe_jax.config import ModelConfig

BENCH = several.ROOT / "bench"


def test_figures_of_a_program_agree():
    D, V, T, B, L = 64, 256, 128, 2, 1
    sizes = f"--d-model={D} --num-layers={L} --num-heads=2 --vocab-size={V} --seq-len={T}"
    options = f"--batch-tokens={B * T} --slices=1 --slices=2 --remat=full --rounds=2 --product=256"
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", *f"{sizes} {options} --no-torch --no-latency".split()],
        capture_output=True,
        text=True,
        check=True,
    )
    rate = float(re.findall(r"runs at (\S+) TFLOP/s", done.stdout)[0])
    rows = re.findall(r"^xla, full +(\d+)" + r" +([\d.]+)%?" * 6 + "$", done.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2], done.stdout
    matrices, pairs = 12 * D * D * L + D * V, B * T * (T + 1) / 2
    flops = 3 * (2 * matrices * B * T + 4 * D * pairs * L)
    for row in rows:
        ms, tokens_per_second, tflops, mfu, of_whole = map(float, row[1:6])
        assert tokens_per_second == pytest.approx(B * T / ms * 1e3, rel=0.02)
        assert tflops == pytest.approx(flops / ms * 1e-9, rel=0.02)
        assert mfu == pytest.approx(100 * tflops / rate, rel=0.02)
        assert of_whole == pytest.approx(100 * float(rows[0][1]) / ms, rel=0.02)
    assert "without cudnn: config.attention.backend=cudnn needs GPUs" in done.stdout


def test_the_gpt_beside_ours_is_the_same_model():
    torch = pytest.importorskip("torch")
    GPT = runpy.run_path(str(BENCH / "torch_gpt.py"))["GPT"]
    config = ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=50, seq_len=16)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(a) + random.normal(0, 0.1, a.shape).astype(np.float32),
        model.init(config, jax.random.key(0)),
    )
    gpt = GPT(SimpleNamespace(vocab_size=50, d_model=32, seq_len=16, num_layers=2, num_heads=4))

    def put(module, weight: np.ndarray, bias: np.ndarray) -> None:
        module.weight.data, module.bias.data = torch.tensor(weight.copy()), torch.tensor(bias)

    gpt.tokens.weight.data = torch.tensor(params["embed"]["tokens"])
    gpt.positions.weight.data = torch.tensor(params["embed"]["positions"])
    put(gpt.norm, params["norm"]["scale"], params["norm"]["bias"])
    for block, values in zip(gpt.blocks, params["blocks"], strict=True):
        for name in ("norm_1", "norm_2"):
            put(getattr(block, name), values[name]["scale"], values[name]["bias"])
        for name in ("attn_out", "ff_in", "ff_out"):
            put(getattr(block, name), values[name]["kernel"].T, values[name]["bias"])
        # Ours has heads first, then q, k and v.
        kernel = values["attn_in"]["kernel"].reshape(32, 4, 3, 8).swapaxes(1, 2).reshape(32, 96)
        bias = values["attn_in"]["bias"].reshape(4, 3, 8).swapaxes(0, 1).reshape(96)
        put(block.attn_in, kernel.T, bias)
    assert sum(p.numel() for p in gpt.parameters()) == model.num_params(config)
    rows = random.integers(0, 50, (3, 17))
    loss = gpt(torch.tensor(rows)).item()
    expected = reference.loss(config, params, jnp.asarray(rows, jnp.int32))
    assert loss == pytest.approx(float(expected), rel=1e-5)
