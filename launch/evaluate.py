"""The loss of a run's model on data: all of it, or what the run holds out.

python launch/evaluate.py --workdir=runs/quickstart
python launch/evaluate.py --workdir=runs/quickstart --data=text.txt --mesh.pipe=2
"""

import sys
from dataclasses import replace

from tpipe_jax.config.command_line import exit_status, load_config, parse_for_trained_model
from tpipe_jax.config.flags import EvaluateFlags
from tpipe_jax.config.settings import Config, DataConfig, TrainConfig


def main() -> None:
    flags = parse_for_trained_model(EvaluateFlags, sys.argv[1:], "python launch/evaluate.py")
    from tpipe_jax.commands.evaluate import evaluate
    from tpipe_jax.commands.trained_model import load
    from tpipe_jax.data.batches import open_held_out
    from tpipe_jax.data.sources import open_shares
    from tpipe_jax.devices.startup import find_devices
    from tpipe_jax.reporting.console import Console

    path = flags.workdir / "config.json"
    data = load_config(path).data if path.exists() else DataConfig()
    if flags.tokenizer is not None:
        data = replace(data, tokenizer=flags.tokenizer)
    train = TrainConfig(batch_size=flags.batch_size * flags.mesh.data)
    config, devices = Config(mesh=flags.mesh, train=train, data=data), find_devices(flags.mesh)
    trained = load(flags.workdir, flags.step, config, devices)
    if flags.data is None:
        config, shares = open_held_out(trained.config)
        trained = trained.with_config(config)
    else:
        vocab_size = trained.config.model.vocab_size
        shares = open_shares("--data", flags.data, vocab_size, data)
    with Console().working("evaluating") as on_progress:
        result = evaluate(trained, shares, on_progress)
    text = f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.4g}"
    if result.bits_per_byte is not None:
        text += f", {result.bits_per_byte:.4f} bits per byte"
    print(f"{text}, of {result.num_tokens:,} tokens after step {trained.step}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
