"""Converts checkpoints from and to Hugging Face folders, array by array, without a run."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import tokenizers
from safetensors import SafetensorError

from tpipe_jax.checkpoint import manifest
from tpipe_jax.checkpoint.arrays import read_array
from tpipe_jax.checkpoint.checkpoints import newest_sound, write_checkpoint
from tpipe_jax.checkpoint.layout import Fragment, arrays
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.own_runs import RUN_FILE, check_named
from tpipe_jax.config.settings import (
    BYTES,
    BYTES_NAME,
    Config,
    DataConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    resolved,
)
from tpipe_jax.data.carried import with_kept_tokenizer
from tpipe_jax.data.end_token import SETTINGS, end_token
from tpipe_jax.data.tokenizer import hugging_face, tokenizer_settings
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.errors import UserError
from tpipe_jax.files import locked, writing_to
from tpipe_jax.interop import gpt2, llama
from tpipe_jax.interop.hugging_face import (
    Reader,
    Source,
    check_inside,
    is_written,
    load_source,
    read_end,
    read_model,
    read_settings,
    read_source,
    write_source,
)
from tpipe_jax.interop.mixtures import balance_weight
from tpipe_jax.interop.write_folder import write_model
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.reporting.workdir import write_config
from tpipe_jax.training.health import new_health
from tpipe_jax.training.loss_scale import new_loss_scale
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state

PARAMS = "params/"
FINE_TUNING_RATE = 5e-5  # a peak learning rate that does not undo what the weights have learnt
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
SOURCE = "hugging_face.json"  # in a workdir: what the folder said that it was imported from
ADAPTERS = gpt2.ADAPTER, llama.ADAPTER


def import_model(source: Path, workdir: Path, seq_len: int | None = None) -> Config:
    """Makes a workdir from a Hugging Face folder, and returns its config.

    The checkpoint of step 0 has the weights of the folder, and config.json its model, its tokenizer
    and the token that ends a document, if it has them. The learning rate is one to train on with.
    `seq_len` replaces the length of sequences in the settings, where positions are not learned.
    Raises `UserError` if the folder has no model that can be imported, or if the workdir is not
    empty.
    """
    adapter, model = read_model(source, ADAPTERS)
    if seq_len is not None and seq_len != model.seq_len:
        if model.family == "gpt2":
            raise UserError(
                f"--seq-len={seq_len} is not the {model.seq_len} tokens for which the model in "
                f"--from={source} has learned positions: leave it out."
            )
        model = replace(model, seq_len=seq_len)
    read = Reader(source, adapter, model)
    about = read_source(source, read)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir={workdir} is not empty: choose a folder for a new run.")
    data, text = _read_tokenizer(source, about, workdir, model.vocab_size)
    optim = OptimConfig(learning_rate=FINE_TUNING_RATE)
    train = TrainConfig(balance_weight=balance_weight(model, about.settings))
    config = resolved(Config(model=model, data=data, optim=optim, train=train))
    with writing_to(workdir):
        is_new = not workdir.exists()
        try:
            write_checkpoint(workdir / "checkpoints", 0, config.model, _parts(config, read))
            if text is not None:
                (workdir / TOKENIZER).write_text(text, encoding="utf-8")
            write_source(workdir / SOURCE, about)
            write_config(config, workdir)
        except BaseException:
            for path in workdir.iterdir() if workdir.exists() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if is_new and workdir.exists():
                workdir.rmdir()
            raise
    return config


def export_model(
    workdir: Path,
    target: Path,
    step: int | None,
    tokenizer: str | None = None,
    dtype: str | None = None,
) -> int:
    """Writes the weights of a checkpoint as a folder that `transformers` loads; returns the step.

    Takes the newest sound checkpoint if `step` is None, and the tokenizer of the run's settings if
    `tokenizer` is None. Writes no tokenizer if the run was trained on tokens of an unknown one.
    The token that ends a document goes along, and what the folder said that the run was imported
    from. Weights have the format `dtype` (`FORMATS`), or that of this folder, or float32.

    Raises `UserError` if there is no sound checkpoint, if no class of transformers computes what
    the model does, or if `target` is not empty or cannot be written.
    """
    checkpoint, model = newest_sound(workdir, step)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to={target} is not empty: choose a folder that is new.")
    if model.has_own_block:
        raise UserError(
            f"--workdir={workdir} has layers of config.model.block={model.block}, which no class "
            "of transformers has: only runs with the blocks of families can be exported."
        )
    adapter = next(a for a in ADAPTERS if a.family == model.family)
    source = load_source(workdir / SOURCE)
    adapter.settings_of(model, {})  # raises before anything is written
    text, end, end_name = _tokenizer_of(workdir, tokenizer, model.vocab_size)
    target = target.absolute()
    shapes = {weight.name: weight.shape for weight in adapter.all_weights(model)}
    try:
        with _saved_as(target) as saving:
            write_model(
                *(saving, adapter, model),
                lambda name: read_array(checkpoint, PARAMS + name, shapes[name]),
                *(source, dtype, end),
            )
            if text is not None:
                (saving / TOKENIZER).write_text(text, encoding="utf-8")
                kept = None if source is None or tokenizer is not None else source.tokenizer
                settings = tokenizer_settings(end_name, model.seq_len, kept)
                (saving / TOKENIZER_SETTINGS).write_text(settings, encoding="utf-8")
    except ValueError as error:  # from TensorStore
        raise UserError(
            f"the checkpoint in {checkpoint} cannot be read any more ({error}): a run may have "
            "removed it meanwhile; the same command takes a newer one."
        ) from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write --to={target} ({error}): make room, remove what is in the way, or "
            "choose another folder."
        ) from None
    return int(checkpoint.name)


def class_of(folder: Path) -> str:
    """Returns the class of transformers that loads a folder which `export_model` has written."""
    return read_settings(folder)["architectures"][0]


@contextmanager
def _saved_as(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside the target, which gets its name at the end; if the block fails,
    it is removed. What a killed export has left there is removed first.

    Raises `UserError` if another export is at work there, or if the folder holds something else.
    """
    saving = target.with_name(target.name + manifest.SAVING)
    saving.mkdir(parents=True, exist_ok=True)
    if saving.is_symlink() or any(not _is_of_export(path) for path in saving.iterdir()):
        raise UserError(
            f"{saving}, where --to={target} is written first, has files that are not of an export: "
            "move it away, or choose another folder."
        )
    descriptor = os.open(saving, os.O_RDONLY)
    with locked(
        descriptor, saving, f"another export writes --to={target}: wait for its end, or stop it."
    ):
        for path in saving.iterdir():
            path.unlink()
        try:
            yield saving
            saving.replace(target)
        finally:
            shutil.rmtree(saving, ignore_errors=True)


def _is_of_export(path: Path) -> bool:
    is_one = path.name in (TOKENIZER, TOKENIZER_SETTINGS) or is_written(path.name)
    return is_one and path.is_file() and not path.is_symlink()


def _read_tokenizer(
    source: Path, about: Source, workdir: Path, vocab_size: int
) -> tuple[DataConfig, str | None]:
    """Returns data settings with the tokenizer of a folder and the token that ends a document, and
    the tokenizer.json for the workdir, if the folder has one.
    """
    path, end = source / TOKENIZER, read_end(about.settings, vocab_size)
    if not path.is_file():
        return DataConfig(separator=end), None
    for name in (TOKENIZER, *SETTINGS):
        check_inside(source, source / name)
    made = _fitting("--from", str(path), vocab_size, "remove it from the folder")
    if end is None:
        end = end_token(made, str(path), None)
    name = None if end is None else made.id_to_token(end)
    kept = str(workdir.absolute() / TOKENIZER)
    separator = end if name is None else None
    return DataConfig(tokenizer=kept, end_token=name, separator=separator), made.to_str()


def _tokenizer_of(
    workdir: Path, name: str | None, vocab_size: int
) -> tuple[str | None, int | None, str | None]:
    """Returns the tokenizer.json of this name, or of the run's settings, None if that is unknown;
    the token that ends a document, and its name, if they are known.
    """
    path, setting = workdir / RUN_FILE, "--tokenizer"
    data = load_config(path).data if path.exists() else DataConfig()
    data = with_kept_tokenizer(data, workdir)
    if name is None:
        if data.tokenizer == BYTES_NAME and (vocab_size != BYTES or not path.exists()):
            return None, data.separator, None  # trained on tokens of a tokenizer that is not known
        check_named(path, Config(data=data), {"data.tokenizer": "add --tokenizer={}"})
        name, setting = data.tokenizer, "config.data.tokenizer"
    made = _fitting(setting, name, vocab_size, "name its own with --tokenizer")
    given = data.end_token if setting == "config.data.tokenizer" else None
    end = end_token(made, name, given)
    end = data.separator if end is None else end
    return made.to_str(), end, None if end is None else made.id_to_token(end)


def _fitting(setting: str, name: str, vocab_size: int, remedy: str) -> tokenizers.Tokenizer:
    """Returns a tokenizer. Raises `UserError` if it has more tokens than the model."""
    made = hugging_face(setting, name)
    size = max(made.get_vocab().values()) + 1  # there may be gaps
    if size > vocab_size:
        raise UserError(
            f"{setting}={name} has {size} tokens, but the model has {vocab_size}: {remedy}."
        )
    return made


def _parts(config: Config, read: Reader) -> Iterator[Fragment]:
    """Yields a fresh state with the imported parameters, array by array."""
    # A checkpoint does not depend on the mesh, so one device will do.
    spec = make_spec(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    like = abstract_state(spec, make_optimizer(config))
    others = {"loss_scale": new_loss_scale(config.precision), "health": new_health()}
    known = {
        f"{section}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(value)
        for section, tree in others.items()
        for path, value in jax.tree_util.tree_leaves_with_path(tree)
    }
    for name, shape, dtype in arrays(config.model, like):
        if name.startswith(PARAMS):
            data = read(name.removeprefix(PARAMS))
        else:
            data = known.get(name, np.zeros(shape, dtype))  # the optimiser state and the step
        yield Fragment(name, shape, shape, tuple(slice(0, n) for n in shape), data)
