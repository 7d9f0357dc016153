"""Weights from and to the folders of Hugging Face's GPT-2.

    python launch/convert.py import --from=gpt2 --workdir=runs/gpt2
    python launch/convert.py export --workdir=runs/gpt2 --to=trained

The first makes a workdir with a checkpoint of step 0, which a run continues from, and a config.json
to start it with; the second writes what transformers.GPT2LMHeadModel.from_pretrained loads. Neither
has the whole model in memory.
"""

import sys

from tpipe_jax.config.command_line import exit_status, parse_convert
from tpipe_jax.config.flags import ImportFlags


def main() -> None:
    flags = parse_convert(sys.argv[1:], "python launch/convert.py")
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    from tpipe_jax.interop import convert

    if isinstance(flags, ImportFlags):
        model = convert.import_gpt2(flags.source, flags.workdir).model
        print(
            f"{flags.workdir} has a model of {model.num_layers} layers, width {model.d_model}, "
            f"{model.num_heads} heads, vocabulary {model.vocab_size}, as step 0; train it with\n"
            f"    python launch/multihost.py --config={flags.workdir}/config.json "
            f"--workdir={flags.workdir} --config.data.train=TOKENS"
        )
    else:
        step = convert.export_gpt2(flags.workdir, flags.to, flags.step)
        print(f"{flags.to} has the weights of step {step}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
