"""What a step takes, by our figures and by the compiler's, and what is done about a limit."""

import dataclasses
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.stages import Compiled

from support import reference
from support.marks import slow
from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from tpipe_jax.devices.hardware import DeviceFacts
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.plan import PlanRequest
from tpipe_jax.planning.schedule import make_schedule, terapipe
from tpipe_jax.training import memory
from tpipe_jax.training.memory import (
    GIB,
    budget,
    fitting_policy,
    fitting_step,
    limit_bytes,
    program_bytes,
)
from tpipe_jax.training.optimizer import make_optimizer

# Activations outweigh all else; a vocabulary large enough for its logits to count.
CONFIG = Config(
    model=ModelConfig(num_layers=4, d_model=64, num_heads=2, vocab_size=2048, seq_len=512),
    mesh=MeshConfig(pipe=2),
    plan=PlanConfig("uniform:8", "uniform:4"),
    train=TrainConfig(batch_size=4),
)
MESH = make_mesh(CONFIG.mesh, jax.devices()[:2])
OPTIMIZER = make_optimizer(CONFIG)


def with_memory(**changes: Any) -> Config:
    return dataclasses.replace(CONFIG, memory=MemoryConfig(**changes))


def of(config: Config, device: DeviceFacts, mesh: Any = None) -> Any:
    """What is asked of a spec, on a mesh of devices that do not exist."""
    return SimpleNamespace(config=config, device=device, mesh=mesh)


@cache
def compiled(remat: str, defer_weight_grads: bool = False) -> Compiled:
    config = with_memory(remat=remat, defer_weight_grads=defer_weight_grads)
    return fitting_step(make_spec(config, MESH), reference.plan_of(config), OPTIMIZER)[1]


def needed(*policy: Any) -> int:
    return program_bytes(compiled(*policy))


@pytest.mark.slow
def test_what_is_computed_again_takes_no_memory():
    """What they save differs by more than what else they take."""
    assert needed("full") < needed("attn") < needed("dots") < needed("none")
    assert needed("dots") < needed("dots", True)


@pytest.mark.parametrize(
    "policy", [slow(("full",)), ("dots",), slow(("none",)), slow(("dots", True))], ids=str
)
def test_the_budget_is_near_what_the_compiler_says(policy: tuple):
    """What it leaves out is what a slice needs while it is worked on, and formats of weights."""
    config = with_memory(remat=policy[0], defer_weight_grads=len(policy) > 1)
    parts = budget(make_spec(config, MESH), terapipe(reference.plan_of(config)), OPTIMIZER)
    assert sum(parts.values()) == pytest.approx(needed(*policy), rel=0.2)
    assert parts["optimiser state"] >= 2 * parts["parameters"]
    assert parts["parameters"] >= 4 * 2 * 12 * 64 * 64


def test_the_budget_under_1f1b_is_near_what_the_compiler_says():
    """Of eight sequences three are kept at a time."""
    config = dataclasses.replace(
        with_memory(remat="dots"),
        plan=PlanConfig("uniform:8", "uniform:8", schedule="1f1b"),
        train=TrainConfig(batch_size=8),
    )
    plan = reference.plan_of(config)
    step = fitting_step(make_spec(config, MESH), plan, OPTIMIZER)[1]
    parts = budget(make_spec(config, MESH), make_schedule(plan), OPTIMIZER)
    assert sum(parts.values()) == pytest.approx(program_bytes(step), rel=0.2)
    whole = budget(make_spec(config, MESH), terapipe(plan), OPTIMIZER)
    for name in ("other activations", "input and output of the stage"):
        assert parts[name] * 8 == whole[name] * 3
    assert sum(parts.values()) < needed("dots") < sum(whole.values())


@pytest.mark.slow
def test_the_budget_of_slices_that_wait_is_near_what_the_compiler_says():
    """Four sequences, and three slices that wait for gradients of weights."""
    config = dataclasses.replace(
        with_memory(remat="dots"),
        plan=PlanConfig("uniform:8", "uniform:8", schedule="1f1b-deferred"),
        train=TrainConfig(batch_size=8),
    )
    plan = reference.plan_of(config)
    schedule = make_schedule(plan)
    assert (schedule.num_rows, schedule.num_slots) == (3, 3)
    step = fitting_step(make_spec(config, MESH), plan, OPTIMIZER)[1]
    parts = budget(make_spec(config, MESH), schedule, OPTIMIZER)
    assert sum(parts.values()) == pytest.approx(program_bytes(step), rel=0.2)
    bytes_of_slot = 64 * 4 * 9 * 64 * 2  # tokens, float32, widths, layers of a stage
    all_at_once = dataclasses.replace(
        config, plan=dataclasses.replace(config.plan, schedule="1f1b")
    )
    others = budget(
        make_spec(all_at_once, MESH), make_schedule(reference.plan_of(all_at_once)), OPTIMIZER
    )
    more = parts["other activations"] - others["other activations"]
    assert more == 3 * bytes_of_slot


def test_a_plan_to_come_may_have_chunks():
    """Those of the request; what fits is judged with them."""
    request = PlanRequest(2, 4, 512, schedule="interleaved", num_layers=4)
    limited = with_memory(limit_gib=1)
    assert (
        fitting_policy(make_spec(limited, MESH), request, OPTIMIZER).config.memory.remat == "dots"
    )
    assert fitting_policy(make_spec(limited, MESH), request, OPTIMIZER).config.plan == limited.plan
    everything = dataclasses.replace(request, schedule=None)
    tight = with_memory(limit_gib=1.5 * needed("dots") / GIB)
    assert (
        fitting_policy(make_spec(tight, MESH), everything, OPTIMIZER).config.memory.remat == "dots"
    )


@pytest.mark.slow
def test_what_fits_under_1f1b_alone_is_computed_again_no_more():
    """Judged by the shortest slices that either schedule may have."""
    request = PlanRequest(2, 8, 512)
    config = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=8))
    shortest = PlanConfig("uniform:64", "uniform:8", schedule="1f1b")
    config_of_least = dataclasses.replace(config, plan=shortest, memory=MemoryConfig(remat="dots"))
    plan = reference.plan_of(config_of_least)
    limit = program_bytes(fitting_step(make_spec(config_of_least, MESH), plan, OPTIMIZER)[1]) / GIB
    limited = dataclasses.replace(config, memory=MemoryConfig(limit_gib=limit))
    assert (
        fitting_policy(make_spec(limited, MESH), request, OPTIMIZER).config.memory.remat == "dots"
    )
    with pytest.raises(UserError, match=r"config.plan.schedule=1f1b, .* would bring it down"):
        fitting_policy(
            make_spec(limited, MESH), dataclasses.replace(request, schedule="terapipe"), OPTIMIZER
        )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "attn", "full"])
def test_auto_takes_the_first_that_fits(remat: str):
    limit = needed(remat) / GIB
    config = with_memory(limit_gib=limit)
    plan = reference.plan_of(config)
    chosen, step = fitting_step(make_spec(config, MESH), plan, OPTIMIZER)
    assert chosen.config.memory == MemoryConfig(limit, remat)
    assert program_bytes(step) <= limit * GIB


def test_without_a_limit_the_fastest_is_taken():
    chosen, _ = fitting_step(make_spec(CONFIG, MESH), reference.plan_of(CONFIG), OPTIMIZER)
    assert chosen.config.memory.remat == "dots"


@pytest.mark.slow
def test_a_limit_that_nothing_meets_says_by_how_much_and_what_helps():
    limit = needed("full") / GIB - 0.001
    config = with_memory(limit_gib=limit)
    with pytest.raises(UserError) as error:
        fitting_step(make_spec(config, MESH), reference.plan_of(config), OPTIMIZER)
    text = str(error.value)
    assert f"limit_gib={limit:g} is 0.001 GiB less than a step takes" in text
    assert "with config.memory.remat=full:" in text
    remedies = "config.train.batch_size", "config.mesh.pipe", "config.optim.shard_state"
    for remedy in (*remedies, "config.plan.schedule=1f1b"):
        assert remedy in text
    assert "defer_weight_grads" not in text
    fixed = dataclasses.replace(config.memory, remat="dots", defer_weight_grads=True)
    with pytest.raises(
        UserError, match=r"defer_weight_grads=false, config.memory.remat=full, a smaller"
    ):
        fitting_step(
            make_spec(dataclasses.replace(config, memory=fixed), MESH),
            reference.plan_of(config),
            OPTIMIZER,
        )


@pytest.mark.slow
def test_a_plan_to_come_is_judged_by_its_smallest_slices():
    """Whole sequences need more, so the limit allows short slices only."""
    request = PlanRequest(2, 4, 512, schedule="terapipe")  # of units of 8 tokens
    shortest = dataclasses.replace(
        with_memory(remat="dots"), plan=PlanConfig("uniform:64", "uniform:4")
    )
    step = fitting_step(make_spec(shortest, MESH), reference.plan_of(shortest), OPTIMIZER)[1]
    limit = program_bytes(step) / GIB
    chosen = fitting_policy(make_spec(with_memory(limit_gib=limit), MESH), request, OPTIMIZER)
    assert chosen.config.memory.remat == "dots"
    whole = dataclasses.replace(request, batch_slices=(4,), token_slices=(512,))
    with pytest.raises(UserError, match="less than a step takes"):
        fitting_policy(make_spec(with_memory(limit_gib=limit), MESH), whole, OPTIMIZER)


def test_the_least_of_what_devices_report_is_the_limit(monkeypatch: pytest.MonkeyPatch):
    gpu = DeviceFacts("gpu", "gpu", memory_bytes=5 * GIB)
    assert limit_bytes(of(CONFIG, gpu)) == 5 * GIB
    assert limit_bytes(of(with_memory(limit_gib=3), gpu)) == 3 * GIB
    assert limit_bytes(of(CONFIG, DeviceFacts("gpu", "gpu"))) is None
    monkeypatch.setattr(memory.jax, "process_count", lambda: 2)
    gather = lambda own: own - [0, 2 * GIB]  # noqa: E731
    monkeypatch.setattr(memory.multihost_utils, "process_allgather", gather)
    assert limit_bytes(of(CONFIG, gpu)) == 3 * GIB


def test_a_cpu_has_its_share_of_the_machine():
    [line] = [n for n in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in n]
    assert limit_bytes(make_spec(CONFIG, MESH)) == pytest.approx(1024 * int(line.split()[1]) / 2)


def test_processes_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    class Device:
        def __init__(self, process_index: int) -> None:
            self.process_index = process_index

    class Mesh:
        devices = np.array([Device(0), Device(0), Device(1), Device(2)])

    mesh: Any = Mesh()
    monkeypatch.setattr(memory, "host_names", lambda: ["here", "here", "there"])
    share = memory.os.sysconf("SC_PAGE_SIZE") * memory.os.sysconf("SC_PHYS_PAGES") / 3
    assert limit_bytes(of(CONFIG, DeviceFacts("cpu", "cpu"), mesh)) == pytest.approx(share)


def test_what_can_never_fit_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "compile_checked", None)
    model = dataclasses.replace(CONFIG.model, d_model=2**20, d_ff=2**22)
    config = dataclasses.replace(CONFIG, model=model)
    with pytest.raises(UserError, match=r"^the memory of a device, .* less than a step takes") as e:
        fitting_step(make_spec(config, MESH), reference.plan_of(config), OPTIMIZER)
    # What is missing is the sum of all that a step takes, not its largest part.
    smallest = make_spec(dataclasses.replace(config, memory=MemoryConfig(remat="full")), MESH)
    parts = budget(smallest, terapipe(reference.plan_of(config)), OPTIMIZER)
    missing = sum(parts.values()) - (limit_bytes(smallest) or 0)
    assert f"is {missing / GIB:.3g} GiB less" in str(e.value)
    assert "tpipe plan --gpu=h100" in str(e.value)


def test_a_plan_to_come_that_fits_by_far_needs_no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "compile_checked", None)
    request = PlanRequest(2, 4, 512, schedule="terapipe")
    assert fitting_policy(make_spec(CONFIG, MESH), request, OPTIMIZER).config.memory.remat == "dots"
    schedule = terapipe(reference.plan_of(CONFIG))
    least = (
        sum(budget(make_spec(with_memory(remat="dots"), MESH), schedule, OPTIMIZER).values()) / GIB
    )
    with pytest.raises(TypeError):  # it would be called here
        fitting_policy(make_spec(with_memory(limit_gib=1.9 * least), MESH), request, OPTIMIZER)
