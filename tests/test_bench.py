"""The benchmarks, in small."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support import reference, several_processes
from tpipe_jax.config.settings import ModelConfig, ScheduleName
from tpipe_jax.model import transformer
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import SCHEDULES, make_schedule, terapipe
from tpipe_jax.planning.simulate import simulate

BENCH = several_processes.ROOT / "bench"


@pytest.mark.slow
def test_faults_lose_nothing_but_steps_since_the_last_checkpoint():
    """A short form of the soak; it judges itself."""
    kinds = ["kill in a save", "flip", "launcher killed"]
    options = ["--seed=3", f"--faults={len(kinds)}", "--kinds", *kinds]
    done = subprocess.run(
        [sys.executable, BENCH / "faults.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 faults" in done.stdout
    rows = re.findall(
        r"^([a-z ]+?)  +1 +([\d.]+), +[\d.]+ +(\d+), +\d+ +[\d.]+$", done.stdout, re.M
    )
    assert sorted(row[0] for row in rows) == sorted(kinds), done.stdout


def test_ratios_that_have_fallen_are_named(capsys: pytest.CaptureFixture[str]):
    compare = runpy.run_path(str(BENCH / "__main__.py"))["compare"]
    assert compare({"a": 0.86, "b": 2.0}, {"a": 1.0, "b": 1.0}) == 0
    assert compare({"a": 0.84}, {"a": 1.0, "b": 1.0}) == 1
    assert "FAILED: a has fallen by more than 15%" in capsys.readouterr().out


def test_results_are_added_to_those_of_other_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCH)
    results = importlib.import_module("results")
    results.add("a", "cases", {"2": {"x": 1.0}, "3": {"x": 2.0}}, "123", tmp_path)
    saved = results.add("a", "cases", {"1": {"x": 3.0}, "3": {"x": 4.0}}, "123", tmp_path)
    assert saved == results.load("a", tmp_path)["cases"]
    assert [(name, case["x"]) for name, case in saved.items()] == [("1", 3), ("2", 1), ("3", 4)]
    assert all(case["date"] for case in saved.values())


def test_the_formula_of_a_paper_s_step_is_the_makespan_of_its_schedule(
    monkeypatch: pytest.MonkeyPatch,
):
    """Where there are no shards, whose reduction comes on top."""
    monkeypatch.syspath_prepend(BENCH)
    v100 = importlib.import_module("v100")
    cluster = v100.fit(v100.SETTINGS)
    for setting in v100.SETTINGS:
        if setting.token_slices is None or setting.num_shards > 1:
            continue
        B, slices = setting.batch_size, setting.token_slices
        schedule = terapipe(Plan(setting.num_stages, (1,) * B, (slices,) * B))
        shapes = [(item.num_rows, item.num_tokens, item.token) for item in schedule.items]
        times = zip(*(v100.slice_seconds(setting, cluster, *each) for each in shapes), strict=True)
        makespan = simulate(schedule, *times).step_seconds
        assert v100.step_seconds(setting, cluster, slices) == pytest.approx(makespan)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="the sleeping stages need a C++ compiler")
@pytest.mark.parametrize("name", SCHEDULES)
def test_stages_that_sleep_take_no_less_than_their_makespan(
    name: ScheduleName, monkeypatch: pytest.MonkeyPatch
):
    """Which a stage that does not wait for its neighbour would, or one that skips a slice."""
    monkeypatch.syspath_prepend(BENCH)
    emulated = importlib.import_module("emulated")
    emulated.load_sleep()
    num_chunks = 2 if name == "interleaved" else 1
    plan = Plan(3, (1, 1), ((5, 3), (4, 4)), schedule=name, num_chunks=num_chunks)
    schedule = make_schedule(plan)
    draw = np.random.default_rng(0)
    positions = dict.fromkeys((item.row, item.token) for item in schedule.items)
    times = [{position: float(draw.uniform(0.05, 0.15)) for position in positions} for _ in "fbw"]
    seconds = [[own[item.row, item.token] for item in schedule.items] for own in times]
    run = emulated.program(plan, times, slowdown=2)
    start = time.perf_counter()
    jax.block_until_ready(run())
    measured = time.perf_counter() - start
    makespan = simulate(
        schedule,
        *seconds[:2],
        weight_seconds=seconds[2],
        chunk_factors=[1 / num_chunks] * (3 * num_chunks),
    ).step_seconds
    assert measured >= 2 * makespan


@pytest.fixture(scope="module")
def gpu() -> Any:
    """bench/gpu.py as a module."""
    sys.path.append(str(BENCH))  # where it finds gpu_trace.py
    spec = importlib.util.spec_from_file_location("gpu", BENCH / "gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # where its dataclass looks for it
    spec.loader.exec_module(module)
    return module


def test_kernels_of_a_step_by_kind(gpu: Any, capsys: pytest.CaptureFixture[str]):
    """Two kernels overlap, and two gaps of 3 us have nothing."""
    names = [
        "nvjet_sm90_tst_128x128",
        "gemm_fusion_dot.3",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90>",
        "cudnn_generated_fort_native_sdpa_sm90",
        "input_scatter_fusion",
        "loop_dynamic_update_slice_fusion_2",
        "input_reduce_fusion",
        "loop_dynamic_slice_fusion",
        "MemcpyD2H",
        "fusion_12",
    ]
    starts = [0, 8_000, 21_000, 31_000, 41_000, 51_000, 61_000, 71_000, 81_000, 94_000]
    events = [(start, 10_000, name) for start, name in zip(starts, names, strict=True)]
    found = sys.modules["gpu_trace"].by_kind(events)
    assert {kind: number for kind, (number, _) in found.items()} == {
        "products": 2,
        "attention": 2,
        "sums over contexts": 1,
        "writes": 1,
        "sums": 1,
        "reads": 1,
        "copies": 1,
        "others": 1,
        "idle": 2,
    }
    assert found["products"][1] == pytest.approx(20e-6)
    assert found["idle"][1] == pytest.approx(6e-6)
    gpu.report_traces({"a": found, "b": {"sums": (3, 1e-3)}})
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert ["sums", "1", "0.01", "ms", "3", "1.00", "ms"] in rows


def test_the_short_table_is_one_length_with_few_programs(gpu: Any):
    args = gpu.parse_args(["--short", "--rounds=2", "--backend=flash"])
    assert (args.num_layers, args.seq_len, args.slices) == (12, [8192], [1, 8, 16])
    assert (args.rounds, args.backend) == (2, ["flash"])
    assert len(gpu.variants(args)) == 5
    assert gpu.parse_args([]).num_layers == 24


D, V, T, B, L = 64, 256, 128, 2, 1
SIZES = f"--d-model={D} --num-layers={L} --num-heads=2 --vocab-size={V} --seq-len={T}"
OPTIONS = f"{SIZES} --batch-tokens={B * T} --slices=1 --slices=2 --remat=full --rounds=2".split()


@pytest.mark.slow
def test_figures_of_a_program_agree():
    """One sequence after another, under each schedule."""
    options = [*OPTIONS, "--product=256", "--no-torch", "--no-latency", f"--batch-slices={B}"]
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", *options], capture_output=True, text=True, check=True
    )
    rate = float(re.findall(r"runs at (\S+) TFLOP/s", done.stdout)[0])
    pattern = r"^xla, full +(\d+ \w+)" + r" +([\d.]+)%?" * 6 + "$"
    rows = re.findall(pattern, done.stdout, re.MULTILINE)
    names = [f"{n} {schedule}" for n in (1, 2) for schedule in ("terapipe", "1f1b")]
    assert [row[0] for row in rows] == names, done.stdout
    matrices, pairs = 12 * D * D * L + D * V, B * T * (T + 1) / 2
    flops = 3 * (2 * matrices * B * T + 4 * D * pairs * L)
    for row in rows:
        ms, tokens_per_second, tflops, mfu, of_whole = map(float, row[1:6])
        assert tokens_per_second == pytest.approx(B * T / ms * 1e3, rel=0.02)
        assert tflops == pytest.approx(flops / ms * 1e-9, rel=0.02)
        assert mfu == pytest.approx(100 * tflops / rate, rel=0.02)
        whole = next(own for own in rows if own[0] == f"1 {row[0].split()[1]}")
        assert of_whole == pytest.approx(100 * float(whole[1]) / ms, rel=0.02)
    assert "without cudnn: config.attention.backend=cudnn needs GPUs" in done.stdout


@pytest.mark.slow
def test_programs_that_fail_leave_the_others_their_rows(
    gpu: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    args = gpu.parse_args(OPTIONS)
    config, mesh = gpu.make_config(args, T), gpu.make_mesh(gpu.Config().mesh, jax.devices()[:1])
    states: list[Any] = []
    monkeypatch.setattr(gpu, "init_state", lambda *_: states.append(0) or jnp.zeros(1))

    def fail(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

    programs = [
        gpu.Program("a", 1, step=lambda state, rows: (state, {}), num_bytes=2**30),
        gpu.Program("b", 1, step=fail),
        gpu.Program("c", 1, failure="does not fit: 99.0 GiB"),
        gpu.Program("a", 2, step=lambda state, rows: (state, {})),
    ]
    gpu.take_turns(args, config, mesh, programs)
    assert [len(p.times) for p in programs] == [2, 0, 0, 2]
    assert len(states) == 2  # a new one after the failure
    peer = {
        "num_params": transformer.num_params(config.model),
        "torch": "2",
        "seconds": 1,
        "peak_bytes": 1,
    }
    gpu.report(config, programs, 1e12, peer)
    text = capsys.readouterr().out
    assert "fails: RESOURCE_EXHAUSTED: out of memory\n" in text
    assert "does not fit: 99.0 GiB\n" in text
    assert len(re.findall(r"^a +[12] ", text, re.MULTILINE)) == 2
    assert re.search(r"^PyTorch 2 +1 +1000.00 ", text, re.MULTILINE)

    monkeypatch.setattr(gpu, "compile_checked", fail)
    compiled = gpu.Program("d", 1)
    gpu.compile_into(compiled, config, mesh)
    assert (compiled.step, compiled.failure[:16]) == (None, "does not compile")
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "limit_bytes", lambda *_: 1000)
    gpu.compile_into(compiled, config, mesh)
    assert compiled.step is None
    assert compiled.failure.startswith("does not fit: 0.0 GiB")
    gpu.take_turns(args, config, mesh, [compiled])
    gpu.report(config, [compiled], 1e12, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("print('hello'); print('{\"seconds\": 1}')", None),
        ("import sys; sys.exit('no\\ntorch')", "torch"),
        ("import os; os.kill(os.getpid(), 9)", "status -9"),
        ("print('rubbish')", "Expecting value"),
        ("import time; time.sleep(60)", "timed out after"),
    ],
)
def test_pytorch_that_fails_is_left_out(
    script: str,
    reason: str | None,
    gpu: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "torch_gpt.py").write_text(script)
    monkeypatch.setattr(gpu, "TORCH_GPT", tmp_path / "torch_gpt.py")
    monkeypatch.setattr(gpu, "TORCH_TIMEOUT_SECONDS", 2)
    figures = gpu.run_torch(gpu.parse_args(OPTIONS), T)
    text = capsys.readouterr().out
    assert (figures, text) == ({"seconds": 1}, "") if reason is None else figures is None
    assert (reason or "") in text


@pytest.mark.slow
def test_pytorch_on_a_cpu_has_to_be_asked_for(gpu: Any, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torch")
    assert gpu.run_torch(gpu.parse_args(OPTIONS), T) is None
    assert "--cpu trains on the CPU" in capsys.readouterr().out
    figures = gpu.run_torch(gpu.parse_args([*OPTIONS, "--cpu"]), T)
    assert figures["num_params"] == transformer.num_params(
        gpu.make_config(gpu.parse_args(OPTIONS), T).model
    )
    assert figures["seconds"] > 0


def test_the_gpt_beside_ours_is_the_same_model():
    torch = pytest.importorskip("torch")
    GPT = runpy.run_path(str(BENCH / "torch_gpt.py"))["GPT"]
    config = ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=50, seq_len=16)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(a) + random.normal(0, 0.1, a.shape).astype(np.float32),
        transformer.init(config, jax.random.key(0)),
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
    assert sum(p.numel() for p in gpt.parameters()) == transformer.num_params(config)
    rows = random.integers(0, 50, (3, 17))
    loss = gpt(torch.tensor(rows)).item()
    expected = reference.loss(config, params, jnp.asarray(rows, jnp.int32))
    assert loss == pytest.approx(float(expected), rel=1e-5)
