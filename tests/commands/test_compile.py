"""`tpipe compile`: what it says of a step for devices that are not here."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from support import runs
from support.compilers import WITHOUT_COMPILER, has_gpu_compiler
from tpipe_jax.commands import compile as compile_module
from tpipe_jax.commands.compile import compile_for, compile_run
from tpipe_jax.config.command_line import parse_compile
from tpipe_jax.config.flags import CompileFlags
from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from tpipe_jax.devices.hardware import GIB, DeviceFacts
from tpipe_jax.devices.targets import Target
from tpipe_jax.errors import UserError
from tpipe_jax.training import memory

CONFIG = Config(
    model=ModelConfig(4, 64, 2, vocab_size=256, seq_len=128),
    mesh=MeshConfig(pipe=2),
    plan=PlanConfig("64,32,32"),
    train=TrainConfig(batch_size=2),
)


class Shown(runs.Lines):
    """Keeps facts and tables, too."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, str] = {}
        self.tables: dict[str, list[Any]] = {}

    def show_facts(self, facts: dict[str, str]) -> None:
        self.facts |= facts

    def show_table(self, title: str, columns: Any, rows: Any, num_names: int = 1) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.tables[title] = [columns, *rows]


def flags(config: Config = CONFIG, **more: Any) -> CompileFlags:
    return CompileFlags(config, Path("run"), **({"gpu": "h100"} | more))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose devices are the CPUs of this machine, so that no other compiler is needed."""

    def target(name: str, mesh: MeshConfig, hosts: int | None) -> Target:
        facts = DeviceFacts("cpu", "GPU", memory_bytes=GIB)
        return Target(jax.devices()[: mesh.num_devices], facts, 2 * GIB, 1)

    monkeypatch.setattr(compile_module, "gpu_target", target)


def with_limit(gib: float, remat: str = "auto") -> Config:
    return replace(CONFIG, memory=MemoryConfig(limit_gib=gib, remat=remat))


@pytest.mark.usefixtures("here")
def test_figures_and_what_is_shown(tmp_path: Path):
    console = Shown()
    compile_run(flags(with_limit(1.0), json=tmp_path / "new" / "program.json"), console)
    figures = json.loads((tmp_path / "new" / "program.json").read_text())
    assert set(figures) == {
        *("gpu", "tpu", "num_devices", "peak_bytes", "argument_bytes", "temporary_bytes"),
        *("limit_bytes", "fits", "copied_bytes_per_tick", "kernels", "collectives"),
        *("compile_seconds", "jax"),
    }
    assert (figures["gpu"], figures["num_devices"], figures["fits"]) == ("h100", 2, True)
    assert figures["limit_bytes"] == GIB
    assert figures["argument_bytes"] < figures["peak_bytes"]
    assert figures["peak_bytes"] <= figures["argument_bytes"] + figures["temporary_bytes"] + 10000
    kernels = figures["kernels"]
    assert set(kernels) == {"forward", "backward", "forward_context", "backward_context"}
    assert 0 < kernels["forward_context"] < kernels["forward"] < kernels["backward"]
    assert figures["collectives"] == {"collective-permute": 2}
    assert figures["copied_bytes_per_tick"] < 120_000
    assert figures["jax"] == jax.__version__
    assert "2 x GPU on 1 host: data 1 x pipe 2 x model 1" in console.facts["devices"]
    assert "6 slices of 32 to 64 tokens, of 2 lengths" in console.facts["step"]  # one by one
    assert console.tables["exchanges between devices"][1][:3] == (
        *("a tick, for its slices", "collective-permute", "2"),
    )
    memory = dict(console.tables["memory of a device with config.memory.remat=dots"][1:])
    assert float(memory["limit"]) == 1
    known = sum(float(gib) for name, gib in memory.items() if "XLA" not in name) - 1
    assert known == pytest.approx(2 * float(memory["all of these"]), abs=0.02)
    assert console.said[-1].startswith("It fits, with 1.00 GiB")
    assert any("The limit is config.memory.limit_gib." in text for text in console.said)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("gib", [0.003, 0.0001], ids=["by XLA's plan", "by shapes alone"])
def test_what_does_not_fit_is_shown_and_refused(gib: float, tmp_path: Path):
    console, path = Shown(), tmp_path / "program.json"
    with pytest.raises(UserError, match=r"less than a step takes with config\.memory\.remat=full"):
        compile_run(flags(with_limit(gib), json=path), console)
    figures = json.loads(path.read_text())
    assert not figures["fits"]
    assert figures["peak_bytes"] > figures["limit_bytes"]
    assert not any(text.startswith("It fits") for text in console.said)
    assert "memory of a device with config.memory.remat=full" in console.tables


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_first_policy_that_fits_is_taken():
    dots = compile_for(flags(with_limit(1, remat="dots"))).figures()["peak_bytes"]
    full = compile_for(flags(with_limit(1, remat="full"))).figures()["peak_bytes"]
    assert isinstance(dots, int)
    assert isinstance(full, int)
    assert full < dots
    chosen = compile_for(flags(with_limit((dots - 1) / GIB)))
    assert chosen.spec.config.memory.remat != "dots"
    assert chosen.shortage is None


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], r"^say what to compile for, with either --gpu=h100 or --tpu=v5e:2x2\.$"),
        (["--gpu=h100", "--tpu=v5e:2x2"], "^say what to compile for"),
        (["--gpu=v10"], r"^--gpu=v10 must be one of v100, v100-32, a100, a100-40, h100, h200, b2"),
        (["--tpu=v5e:2x2", "--hosts=2"], r"^--hosts=2 is for GPUs, and the topology --tpu=v5e:2x"),
        (["--gpu=h100", "--hosts=0"], "^--hosts=0 must be at least 1"),
    ],
)
def test_flags_that_contradict_each_other(args: list[str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        parse_compile(args, "tpipe compile")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (replace(CONFIG, plan=PlanConfig()), r"^config\.plan\.token_slices=auto needs measureme"),
        (replace(CONFIG, plan=PlanConfig("auto", "1,1")), "give slices, such as uniform:16, or a"),
        (replace(CONFIG, mesh=MeshConfig(auto=True)), r"^config\.mesh\.auto=true needs measurem"),
        (replace(CONFIG, plan=PlanConfig("64,32")), "sums to 96"),
        (replace(CONFIG, mesh=MeshConfig(model=3)), r"^config\.mesh\.model=3"),
    ],
)
@pytest.mark.usefixtures("here")
def test_settings_that_cannot_be_compiled(config: Config, sentence: str):
    with pytest.raises(UserError, match=sentence):
        compile_for(flags(config))


@pytest.mark.usefixtures("here")
def test_a_file_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write --json=.*/file/x\.json \("):
        compile_run(flags(json=tmp_path / "file" / "x.json"), Shown())


@pytest.mark.usefixtures("here")
def test_a_plan_from_a_file(tmp_path: Path):
    compile_for(flags()).plan.save(tmp_path / "plan.json")
    config = replace(CONFIG, plan=PlanConfig(file=str(tmp_path / "plan.json")))
    assert compile_for(flags(config)).plan.token_slices == ((64, 32, 32),) * 2


@pytest.mark.slow
@pytest.mark.skipif(not has_gpu_compiler(), reason=WITHOUT_COMPILER)
def test_the_command(tmp_path: Path):
    """The paper's largest setting, for 384 GPUs: it fits, and libraries print nothing."""
    slices = ",".join(map(str, [120] * 4 + [112] * 6 + [104] * 8 + [64]))
    command = [sys.executable, "launch/compile.py", "--config=configs/gpt3_175b.py", "--gpu=v100"]
    command += ["--hosts=48", f"--config.plan.token-slices={slices}"]
    command += [f"--json={tmp_path / 'program.json'}"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads((tmp_path / "program.json").read_text())
    assert (figures["gpu"], figures["num_devices"], figures["fits"]) == ("v100", 384, True)
    assert 7 * GIB < figures["peak_bytes"] < 10 * GIB
    assert "384 x Tesla V100-SXM2-16GB on 48 hosts" in done.stdout
    command += ["--config.memory.limit-gib=5"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config.memory.limit_gib=5 is ")
    assert done.stderr.count("\n") == 1


def refused(*_: Any) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: CompileTimeHbmOom: 200.00G of 15.75G")


@pytest.mark.usefixtures("here")
def test_a_compiler_that_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As that of TPUs. All policies are tried, and the figures say what is known."""
    monkeypatch.setattr(memory, "compile_step", refused)
    monkeypatch.setattr(compile_module, "compile_step", refused)
    console, path = Shown(), tmp_path / "program.json"
    with pytest.raises(UserError, match=r"less than a step takes with config\.memory\.remat=full"):
        compile_run(flags(with_limit(1), json=path), console)
    figures = json.loads(path.read_text())
    assert (figures["fits"], figures["peak_bytes"], figures["kernels"]) == (False, None, None)
    assert figures["limit_bytes"] == GIB
    assert "memory of a device with config.memory.remat=full" in console.tables


@pytest.mark.usefixtures("here")
def test_a_compiler_that_fails_otherwise(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("NOT_FOUND: no ptxas")

    monkeypatch.setattr(memory, "compile_step", fail)
    with pytest.raises(UserError, match=r"^XLA cannot compile for a GPU here \(NOT_FOUND: no p"):
        compile_for(flags())
