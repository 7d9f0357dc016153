"""`tpipe generate`: continues a text with the model of a run."""

import itertools

from tpipe_jax.config.command_line import parse_generate
from tpipe_jax.config.settings import Config, ModelConfig

REMEDY = "give its own with --tokenizer, or --prompt-ids"


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_generate(args, program)
    from tpipe_jax.commands.generate import Generator, chooser
    from tpipe_jax.commands.prompts import encode_prompt, parse_ids, tokenizer_of
    from tpipe_jax.commands.trained_model import load
    from tpipe_jax.devices.startup import find_devices

    is_text, mesh = flags.prompt is not None, flags.mesh.config()
    tokenizer = tokenizer_of(flags.workdir, flags.tokenizer) if is_text else None
    config = Config(ModelConfig(block=flags.block), mesh)
    spec, params, _ = load(flags.workdir, flags.step, config, find_devices(mesh))
    model = spec.config.model
    if tokenizer is not None:
        prompt = encode_prompt("--prompt", flags.prompt or "", tokenizer, model, REMEDY)
    else:
        prompt = parse_ids(flags.prompt_ids or "", model)
    choose = chooser(flags.temperature, flags.top_p, flags.seed)
    following = Generator(spec, params).tokens_after(prompt, choose)
    tokens = itertools.islice(following, flags.max_tokens)
    print(flags.prompt or " ".join(map(str, prompt)), end="", flush=True)
    for text in tokenizer.stream(tokens) if tokenizer else map(" {}".format, tokens):
        print(text, end="", flush=True)
    print()
