"""`tpipe tokenize`: turns text into token shards to train on, in parallel. No jax."""

import shlex
from pathlib import Path

from tpipe_jax.cli.next_steps import new_workdir
from tpipe_jax.config.command_line import parse_tokenize
from tpipe_jax.config.invocation import command
from tpipe_jax.config.settings import BYTES, BYTES_NAME
from tpipe_jax.errors import UserError
from tpipe_jax.files import writing_to


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_tokenize(args, program)
    from tpipe_jax.data.token_shards import TOKENIZER, cut, find_files, make_shards, texts
    from tpipe_jax.data.tokenizer import open_tokenizer, train_bpe
    from tpipe_jax.reporting.console import Console, count

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
    vocab_size, settings = BYTES, [f"--config.data.train={flags.out}"]
    if tokenizer != BYTES_NAME:
        vocab_size = open_tokenizer("--tokenizer", tokenizer).vocab_size
        settings += [f"--config.data.tokenizer={flags.out / TOKENIZER}"]
    settings += [f"--config.model.vocab-size={vocab_size}", f"--workdir={new_workdir('mine')}"]
    console.say(
        f"{flags.out} has {num_tokens:,} tokens of {count(num_documents, 'document')} in "
        f"{count(len(results), 'shard')}; train on it with"
    )
    console.say(f"    {command('train')} {shlex.join(settings)}")
