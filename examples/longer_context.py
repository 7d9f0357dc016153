"""Continues a Hugging Face checkpoint of Llama's family at four times its context.

python examples/longer_context.py path/to/model text.txt runs/longer
"""

import sys
from dataclasses import replace
from pathlib import Path

import jax

from tpipe_jax import Config, import_model, load, train
from tpipe_jax.config import MeshConfig, OptimConfig, PlanConfig, TrainConfig

FACTOR, STEPS = 4, 20
jax.config.update("jax_num_cpu_devices", 2)  # two stages, also where there are no GPUs


def main(source: str, text: str, workdir: str) -> None:
    config = import_model(source, workdir)  # its checkpoint of step 0 has the weights
    short, mesh = config.model.seq_len, MeshConfig(pipe=2)
    model = replace(config.model, seq_len=FACTOR * short, rope_scaling=f"yarn:{FACTOR},{short}")
    longer = replace(
        config,
        model=model,
        mesh=mesh,
        plan=PlanConfig(token_slices=f"uniform:{2 * FACTOR}"),  # or leave it out, to plan
        data=replace(config.data, train=text),
        optim=OptimConfig(learning_rate=2e-5, warmup_steps=5),
        train=TrainConfig(num_steps=STEPS, batch_size=1, log_every=5, eval_every=STEPS),
    )
    before = load(workdir, config=Config(mesh=mesh)).evaluate(text).loss
    train(longer, workdir)
    after = load(workdir, config=Config(mesh=mesh)).evaluate(text).loss
    print(f"{short} tokens of context: {before:.3f} nats per token", end="; ")
    print(f"{FACTOR * short} tokens, after {STEPS} steps: {after:.3f}")
    print(f"tpipe convert export --workdir={workdir} --to={Path(workdir) / 'transformers'}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
