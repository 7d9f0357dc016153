"""`tpipe convert`: weights from and to Hugging Face folders."""

import shlex

from tpipe_jax.config.command_line import parse_convert
from tpipe_jax.config.flags import ImportFlags
from tpipe_jax.config.invocation import command


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_convert(args, program)
    if flags is None:
        return
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    from tpipe_jax.interop import convert

    if isinstance(flags, ImportFlags):
        config = convert.import_model(flags.source, flags.workdir, flags.seq_len)
        model, has_text = config.model, (flags.workdir / convert.TOKENIZER).exists()
        print(
            f"{flags.workdir} has a model of {model.num_layers} layers, width {model.d_model}, "
            f"{model.num_heads} heads, vocabulary {model.vocab_size}, as step 0, "
            f"{'and its tokenizer' if has_text else 'and no tokenizer'}; train it further with\n"
            f"    {command('train')} --workdir={shlex.quote(str(flags.workdir))} "
            f"--config.data.train={'TEXT' if has_text else 'TOKENS'} "
            f"--config.optim.learning-rate={config.optim.learning_rate:g}"
        )
    else:
        step = convert.export_model(
            flags.workdir, flags.to, flags.step, flags.tokenizer, flags.dtype
        )
        has_text = (flags.to / convert.TOKENIZER).exists()
        tokenizer = "and the tokenizer" if has_text else "and no tokenizer: the run names none"
        print(f"{flags.to} has the weights of step {step}, {tokenizer}; load it with")
        loader = convert.class_of(flags.to)
        print(f"    transformers.{loader}.from_pretrained({str(flags.to)!r})")
        if has_text:
            print(f"    transformers.AutoTokenizer.from_pretrained({str(flags.to)!r})")
