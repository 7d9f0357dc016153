"""Turns text into token shards to train on, in parallel; the same command goes on if it is stopped.

    python launch/tokenize.py --out=shards --tokenizer=tokenizer.json texts/ more.jsonl
    python launch/tokenize.py --out=shards --train-bpe=32000 texts/
    python launch/multihost.py --config.data.train=shards --config.model.vocab-size=32000

A text file is a document, and so is each record of a .jsonl or .parquet file, in its field --field,
and of an .array_record file. Documents end with the tokenizer's <|endoftext|> if it has that.
Nothing is read from the network.
"""

import sys

if __name__ == "tokenize":
    # Python's own module of this name is looked for in this folder first, by each script of it.
    from importlib.util import module_from_spec, spec_from_file_location
    from sysconfig import get_path

    spec = spec_from_file_location("tokenize", f"{get_path('stdlib')}/tokenize.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tokenize"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tokenize"])


def main() -> None:
    from pathlib import Path

    from tpipe_jax.config.command_line import parse_tokenize
    from tpipe_jax.data.token_shards import cut, find_files, make_shards, texts
    from tpipe_jax.data.tokenizer import train_bpe
    from tpipe_jax.errors import UserError
    from tpipe_jax.files import writing_to
    from tpipe_jax.reporting.console import Console

    flags = parse_tokenize(sys.argv[1:], "python launch/tokenize.py")
    console, tokenizer = Console(), flags.tokenizer
    if flags.out.exists():
        raise UserError(f"--out={flags.out} is there already: choose another folder, or remove it.")
    if flags.train_bpe is not None:
        path = Path(f"{flags.out}.tokenizer.json")
        parts = cut(find_files(flags.inputs))
        documents = (text for part in parts for text in texts(part, flags.field))
        made = train_bpe(documents, flags.train_bpe)
        with writing_to(path.parent, "--out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made.to_str(pretty=True))
        console.say(f"a tokenizer of {made.get_vocab_size()} tokens is in {path}")
        tokenizer = str(path)
    with console.working("tokenizing") as on_progress:
        results = make_shards(
            flags.inputs, flags.out, tokenizer, flags.field, flags.num_workers, on_progress
        )
    num_documents = sum(result.num_documents for result in results)
    num_tokens = sum(result.num_tokens for result in results)
    console.say(
        f"{flags.out} has {num_tokens:,} tokens of {num_documents:,} documents in {len(results)} "
        f"shards; train on it with --config.data.train={flags.out}"
    )


if __name__ == "__main__":
    from tpipe_jax.config.command_line import exit_status

    sys.exit(exit_status(main))
