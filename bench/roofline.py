"""Predictions for GPUs that are not here, beside steps that were measured.

    pip install -e ".[compile,flash12]"     # Python 3.12 or newer
    python bench/roofline.py
    python bench/roofline.py --only=paper --settings 8 9

The times are those that `tpipe plan --gpu` plans from: programs of one layer are compiled for the
GPU, and a roofline reads them. First come the steps of `docs/gpu.md` that the present program still
makes; their GPUs are what the roofline was fitted to. Then come the paper's V100s
(`bench/v100.py`), unsliced and, where the paper states its slices, with these. Nothing was fitted
to them. The paper timed another program, PyTorch with Megatron-LM's layers, so this says how far
the two are apart. It leaves out what is outside of the pipeline, as `bench/v100.py` does, except
the sum of gradients over data shards.

Nothing runs on a GPU. Writes `bench/results/roofline.json`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import results
from tpipe_jax.commands.plan_ahead import unit_to_plan
from tpipe_jax.config.settings import (
    AttentionConfig,
    Backend,
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from tpipe_jax.devices.speeds import Network, speed_of
from tpipe_jax.devices.targets import gpu_target, prepare_compiler
from tpipe_jax.pipeline.spec import spec_on_devices
from tpipe_jax.planning.plan import PlanRequest
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.settings import uniform
from tpipe_jax.profiling.predicted import Predictor
from tpipe_jax.runtime.noise import without_noise
from v100 import DEVICES_PER_HOST, SETTINGS, Setting

HEADS = {2048: 16, 5120: 40, 6144: 48, 12288: 96}  # of the paper's models, by width
PAPERS_NETWORK = Network(DEVICES_PER_HOST, 25e9 / 8, 20e-6)


class Measured(NamedTuple):
    """A step of docs/gpu.md: 4 layers of GPT3-1B on an H200, 2 x 8192 tokens, `dots` saved."""

    backend: Backend
    num_slices: int
    defer: bool
    seconds: float


MEASURED = [
    Measured("flash", 1, False, 73.5e-3),
    Measured("flash", 16, False, 100.5e-3),
    Measured("flash", 16, True, 94.0e-3),
]


class Prediction(NamedTuple):
    """A step, measured and predicted."""

    name: str
    slices: str
    measured_seconds: float
    predicted_seconds: float

    @property
    def error(self) -> float:
        return self.predicted_seconds / self.measured_seconds - 1


def main() -> None:
    args = parse_args()
    prepare_compiler()
    saved = {}
    for part, predict in (("measured", predict_measured), ("paper", predict_paper)):
        if args.only in (None, part):
            found = predict(args)
            show(part, found)
            saved[part] = {f"{p.name}, {p.slices}": p[2:] for p in found}
    if args.only is None and not args.settings:
        results.save("roofline", saved, args.folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("measured", "paper"))
    parser.add_argument("--settings", type=int, nargs="+", help="of the paper, by their number")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="for the results")
    return parser.parse_args()


def predict_measured(args: argparse.Namespace) -> list[Prediction]:
    found = []
    for step in MEASURED:
        config = Config(
            model=ModelConfig(
                num_layers=4, d_model=2048, num_heads=16, vocab_size=50257, seq_len=8192
            ),
            train=TrainConfig(batch_size=2),
            attention=AttentionConfig(backend=step.backend),
            memory=MemoryConfig(remat="dots", defer_weight_grads=step.defer),
            plan=PlanConfig(schedule="terapipe"),
        )
        slices = tuple(uniform(8192, step.num_slices))
        network = Network(8, speed_of("h200").host_gbits * 1e9 / 8, 20e-6)
        [seconds] = predicted(config, "h200", 1, network, (2,), [slices])
        name = f"H200, {step.backend}" + ", deferred" * step.defer
        found.append(Prediction(name, f"{step.num_slices} slices", step.seconds, seconds))
    return found


def predict_paper(args: argparse.Namespace) -> list[Prediction]:
    found = []
    for setting in SETTINGS:
        if args.settings and int(setting.name.partition(" ")[0].rstrip(",")) not in args.settings:
            continue
        ways: dict[str, tuple[tuple[int, ...], float]] = {
            "unsliced": ((setting.seq_len,), setting.unsliced_seconds)
        }
        if setting.token_slices and len(setting.token_slices) > 1:
            ways["its slices"] = setting.token_slices, setting.sliced_seconds
        config, network = of_paper(setting), PAPERS_NETWORK
        rows = (1,) * setting.batch_size
        num_hosts = config.mesh.num_devices // DEVICES_PER_HOST
        slices = [own for own, _ in ways.values()]
        times = predicted(config, "v100", num_hosts, network, rows, slices, is_pipeline=True)
        for (name, (_, measured)), seconds in zip(ways.items(), times, strict=True):
            found.append(Prediction(setting.name, name, measured, seconds))
    return found


def of_paper(setting: Setting) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=setting.num_layers,
            d_model=setting.d_model,
            num_heads=HEADS[setting.d_model],
            vocab_size=50257,
            seq_len=setting.seq_len,
        ),
        mesh=MeshConfig(setting.num_shards, setting.num_stages, setting.num_operators),
        train=TrainConfig(batch_size=setting.batch_size * setting.num_shards),
        memory=MemoryConfig(remat="dots"),
        plan=PlanConfig(schedule="terapipe"),
    )


def predicted(
    config: Config,
    gpu: str,
    num_hosts: int,
    network: Network,
    batch_slices: tuple[int, ...],
    token_slices: Sequence[tuple[int, ...]],
    *,
    is_pipeline: bool = False,
) -> list[float]:
    """Returns the seconds of a step with each of some slices; with `is_pipeline`, without what is
    outside of the pipeline, but with the sum of gradients over data shards.
    """
    with without_noise():
        target = gpu_target(gpu, config.mesh, num_hosts)
        spec = spec_on_devices(config, target.devices, target.facts)
        unit = math.gcd(unit_to_plan(spec.config), *(n for own in token_slices for n in own))
        predictor = Predictor(gpu, speed_of(gpu), network)
        profile = predictor.profile(spec, unit)
    if is_pipeline:
        profile = replace(profile, outside_seconds=predictor.reduction_seconds(spec))
    request = PlanRequest(config.mesh.pipe, sum(batch_slices), config.model.seq_len)
    seconds = []
    for own in token_slices:
        asked = replace(request, batch_slices=batch_slices, token_slices=own, schedule="terapipe")
        plan = find_plan(profile.table(unit), asked, [1.0] * config.mesh.pipe).plan
        assert plan.prediction
        seconds.append(plan.prediction.step_seconds)
    return seconds


def show(part: str, found: list[Prediction]) -> None:
    print(f"\n{part:24}{'slices':>12}{'measured, ms':>14}{'predicted, ms':>15}{'error':>8}")
    for p in found:
        times = f"{1e3 * p.measured_seconds:14.1f}{1e3 * p.predicted_seconds:15.1f}"
        print(f"{p.name:24}{p.slices:>12}{times}{p.error:+8.1%}", flush=True)
    logs = [abs(math.log1p(p.error)) for p in found]
    print(f"geometric mean error {math.expm1(sum(logs) / len(logs)):.1%}")


if __name__ == "__main__":
    main()
