"""`tpipe tokenize`: turns text into token shards to train on, in parallel. No jax."""

import shlex
from collections import Counter

from tpipe_jax.cli.next_steps import new_workdir
from tpipe_jax.config.command_line import parse_tokenize
from tpipe_jax.config.invocation import command
from tpipe_jax.config.settings import BYTES_NAME
from tpipe_jax.errors import UserError


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_tokenize(args, program)
    from tpipe_jax.data.documents import HowToRead, skipped_text
    from tpipe_jax.data.token_shards import TOKENIZER, find_files, make_shards
    from tpipe_jax.data.tokenizer import open_tokenizer
    from tpipe_jax.reporting.console import Console, count

    console = Console()
    if flags.out.exists():
        raise UserError(f"--out={flags.out} is there already: choose another folder, or remove it.")
    how = HowToRead(
        flags.field, flags.text_separator, flags.on_empty, int(flags.max_record_mib * 2**20)
    )
    for note in find_files(flags.inputs, flags.field)[1]:
        console.say(note)
    tokenizer = flags.train_bpe or flags.tokenizer
    with console.working("tokenizing") as on_progress:
        results = make_shards(
            flags.inputs, flags.out, tokenizer, how, flags.num_workers, on_progress, flags.end_token
        )
    is_bytes = flags.train_bpe is None and flags.tokenizer == BYTES_NAME
    own = BYTES_NAME if is_bytes else str(flags.out / TOKENIZER)
    if flags.train_bpe:
        size = open_tokenizer("--tokenizer", own).vocab_size
        console.say(f"a tokenizer of {size} tokens is in {flags.out}.{TOKENIZER}")
    num_documents = sum(result.num_documents for result in results)
    num_tokens = sum(result.num_tokens for result in results)
    opened = open_tokenizer("--tokenizer", own, flags.end_token)
    skipped = sum((Counter(result.skipped) for result in results), Counter())
    if text := skipped_text(skipped):
        console.say(text)
    if opened.end is None:
        console.say(
            f"nothing separates the documents, since --tokenizer={own} has no token for that"
        )
    settings = [f"--config.data.train={flags.out}", f"--workdir={new_workdir('mine')}"]
    console.say(
        f"{flags.out} has {num_tokens:,} tokens of {count(num_documents, 'document')} in "
        f"{count(len(results), 'shard')}; train on it with"
    )
    console.say(f"    {command('train')} {shlex.join(settings)}")
