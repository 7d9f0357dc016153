"""What a folder of token shards brings along, its tokenizer and its vocabulary, and the tokenizer
that a run keeps in its workdir.
"""

from dataclasses import replace
from pathlib import Path

from tpipe_jax.config.own_runs import KEPT
from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import BYTES, BYTES_NAME, Config, DataConfig
from tpipe_jax.data.end_token import end_token, write_end
from tpipe_jax.data.token_files import about_shards, tokenizer_of_shards
from tpipe_jax.data.tokenizer import hugging_face
from tpipe_jax.errors import UserError


def with_carried(config: Config) -> tuple[Config, str]:
    """Returns the config with the tokenizer and the vocabulary of the shards that it trains on,
    where it has those of bytes; and a line on that, or an empty one.
    """
    data, model = config.data, config.model
    folder = expanded("config.data.train", data.train)
    about = about_shards(folder) if data.train else None
    if about is None or (own := tokenizer_of_shards(folder, about)) is None:
        return config, ""
    changes = []
    if data.tokenizer == BYTES_NAME:
        data = replace(data, tokenizer=str(own))
        changes.append(f"config.data.tokenizer={data.tokenizer}")
    size = about.get("vocab_size")
    if model.vocab_size == BYTES and isinstance(size, int) and size > BYTES:
        model = replace(model, vocab_size=size)
        changes.append(f"config.model.vocab_size={size}")
    if not changes:
        return config, ""
    return replace(config, data=data, model=model), (
        f"config.data.train={config.data.train} brings along {' and '.join(changes)}"
    )


def check_kept_tokenizer(data: DataConfig, workdir: Path) -> None:
    """Raises `UserError` if the workdir keeps another tokenizer than that of the settings."""
    kept = workdir / KEPT
    if data.tokenizer == BYTES_NAME or not kept.is_file():
        return
    if kept.read_bytes() != expanded("config.data.tokenizer", data.tokenizer).read_bytes():
        raise UserError(
            f"config.data.tokenizer={data.tokenizer} is not the tokenizer that this run began "
            f"with, which is in {kept}: leave it out, or choose another --workdir."
        )


def keep_tokenizer(data: DataConfig, workdir: Path) -> None:
    """Copies the tokenizer of a run into its workdir. Raises OSError if it cannot be written."""
    kept = workdir / KEPT
    if data.tokenizer != BYTES_NAME and not kept.exists():
        kept.write_bytes(expanded("config.data.tokenizer", data.tokenizer).read_bytes())
        made = hugging_face("config.data.tokenizer", data.tokenizer)
        write_end(workdir, made, end_token(made, data.tokenizer, data.end_token))


def with_kept_tokenizer(data: DataConfig, workdir: Path) -> DataConfig:
    """Returns the data settings of a run with the tokenizer that its workdir keeps, if there is
    one: the settings name it by a path that may have changed.
    """
    kept = workdir / KEPT
    if data.tokenizer == BYTES_NAME or not kept.is_file():
        return data
    return replace(data, tokenizer=str(kept))
