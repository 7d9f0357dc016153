"""`tpipe tokenize`: turns text into token shards to train on, in parallel. No jax."""

import shlex
from collections import Counter
from pathlib import Path

from tpipe_jax.cli.next_steps import new_workdir
from tpipe_jax.config.command_line import parse_tokenize
from tpipe_jax.config.invocation import command
from tpipe_jax.errors import UserError
from tpipe_jax.files import writing_to


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_tokenize(args, program)
    from tpipe_jax.data.documents import HowToRead, skipped_text
    from tpipe_jax.data.token_shards import cut, find_files, make_shards, texts
    from tpipe_jax.data.tokenizer import open_tokenizer, train_bpe
    from tpipe_jax.reporting.console import Console, count

    console, tokenizer = Console(), flags.tokenizer
    if flags.out.exists():
        raise UserError(f"--out={flags.out} is there already: choose another folder, or remove it.")
    how = HowToRead(flags.field, flags.text_separator, flags.on_empty)
    files, notes = find_files(flags.inputs, flags.field)
    for note in notes:
        console.say(note)
    if flags.train_bpe is not None:
        path = Path(f"{flags.out}.tokenizer.json")
        parts = cut(files, how)
        documents = (piece.text for part in parts for piece in texts(part, how, Counter()))
        made = train_bpe(documents, flags.train_bpe)
        with writing_to(path.parent, "--out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made.to_str(pretty=True), encoding="utf-8")
        console.say(f"a tokenizer of {made.get_vocab_size()} tokens is in {path}")
        tokenizer = str(path)
    with console.working("tokenizing") as on_progress:
        results = make_shards(
            flags.inputs, flags.out, tokenizer, how, flags.num_workers, on_progress, flags.end_token
        )
    num_documents = sum(result.num_documents for result in results)
    num_tokens = sum(result.num_tokens for result in results)
    opened = open_tokenizer("--tokenizer", tokenizer, flags.end_token)
    skipped = sum((Counter(result.skipped) for result in results), Counter())
    if text := skipped_text(skipped):
        console.say(text)
    if opened.end is None:
        console.say(
            f"nothing separates the documents, since --tokenizer={tokenizer} has no token for that"
        )
    settings = [f"--config.data.train={flags.out}", f"--workdir={new_workdir('mine')}"]
    console.say(
        f"{flags.out} has {num_tokens:,} tokens of {count(num_documents, 'document')} in "
        f"{count(len(results), 'shard')}; train on it with"
    )
    console.say(f"    {command('train')} {shlex.join(settings)}")
