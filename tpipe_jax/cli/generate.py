"""`tpipe generate`: continues a text with the model of a run."""

from tpipe_jax.config.command_line import parse_generate
from tpipe_jax.config.settings import Config, ModelConfig

REMEDY = "give its own with --tokenizer, or --prompt-ids"
BETWEEN = "---"  # a line between two samples


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_generate(args, program)
    from tpipe_jax.commands.generate import Generator, chooser, until_end
    from tpipe_jax.commands.prompts import (
        encode_prompt,
        ends_of,
        parse_ids,
        read_prompt,
        tokenizer_of,
    )
    from tpipe_jax.commands.trained_model import load
    from tpipe_jax.devices.startup import find_devices

    name, text, tokenizer, mesh = "--prompt", flags.prompt, None, flags.mesh.config()
    if flags.prompt_file is not None:
        name, text = f"--prompt-file={flags.prompt_file}", read_prompt(flags.prompt_file)
    if text is not None:
        tokenizer = tokenizer_of(flags.workdir, flags.tokenizer)
    ends = ends_of(flags.workdir, tokenizer) if flags.stop_at_end else set()
    config = Config(ModelConfig(block=flags.block), mesh)
    spec, params, _ = load(flags.workdir, flags.step, config, find_devices(mesh))
    model = spec.config.model
    if tokenizer is not None and text is not None:
        prompt = encode_prompt(name, text, tokenizer, model, REMEDY)
    else:
        prompt = parse_ids(flags.prompt_ids or "", model)
    choose = chooser(flags.temperature, flags.top_p, flags.seed, flags.top_k)
    generator = Generator(spec, params)
    for n in range(flags.num_samples):
        if n:
            print(BETWEEN)
        tokens = until_end(generator.tokens_after(prompt, choose), ends, flags.max_tokens)
        print(" ".join(map(str, prompt)) if text is None else text, end="", flush=True)
        for part in tokenizer.stream(tokens, prompt) if tokenizer else map(" {}".format, tokens):
            print(part, end="", flush=True)
        print()
