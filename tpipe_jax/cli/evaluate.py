"""`tpipe evaluate`: the loss of a run's model on data, all of it, or what the run holds out."""

from dataclasses import replace

from tpipe_jax.config.command_line import parse_evaluate
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.own_runs import RUN_FILE, check_named
from tpipe_jax.config.settings import Config, DataConfig, ModelConfig, TrainConfig


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_evaluate(args, program)
    from tpipe_jax.commands.evaluate import evaluate
    from tpipe_jax.commands.trained_model import load
    from tpipe_jax.data.batches import open_held_out
    from tpipe_jax.data.carried import with_kept_tokenizer
    from tpipe_jax.data.sources import open_shares
    from tpipe_jax.devices.startup import find_devices
    from tpipe_jax.reporting.console import Console

    path, mesh = flags.workdir / RUN_FILE, flags.mesh.config()
    data = load_config(path).data if path.exists() else DataConfig()
    data = with_kept_tokenizer(data, flags.workdir)
    named = {} if flags.tokenizer is not None else {"data.tokenizer": "add --tokenizer={}"}
    if flags.data is None:
        named |= dict.fromkeys(("data.train", "data.eval"), "add --data={}")
    check_named(path, Config(data=data), named)
    if flags.tokenizer is not None:
        data = replace(data, tokenizer=flags.tokenizer)
    train = TrainConfig(batch_size=flags.batch_size * mesh.data)
    model, devices = ModelConfig(block=flags.block), find_devices(mesh)
    config = Config(model, mesh, train=train, data=data)
    trained = load(flags.workdir, flags.step, config, devices)
    if flags.data is None:
        config, shares = open_held_out(trained.config)
        trained = trained.with_config(config)
    else:
        vocab_size = trained.config.model.vocab_size
        shares = open_shares("--data", flags.data, vocab_size, data, is_held_out=True)
    console = Console()
    for note in dict.fromkeys(note for share in shares for note in share.source.notes):
        console.say(note)
    with console.working("evaluating") as on_progress:
        result = evaluate(trained, shares, on_progress)
    text = f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.4g}"
    if result.bits_per_byte is not None:
        text += f", {result.bits_per_byte:.4f} bits per byte"
    console.say(f"{text}, of {result.num_tokens:,} tokens after step {trained.step}")
