"""Converts checkpoints from and to Hugging Face folders of GPT-2, array by array, without a run."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError

from tpipe_jax.checkpoint import manifest
from tpipe_jax.checkpoint.arrays import read_array
from tpipe_jax.checkpoint.checkpoints import newest_sound, write_checkpoint
from tpipe_jax.checkpoint.layout import Fragment, arrays
from tpipe_jax.config.config_files import RUN_FILE, load_config
from tpipe_jax.config.settings import BYTES, BYTES_NAME, GPT2, Config, MeshConfig, resolved
from tpipe_jax.data.tokenizer import hugging_face, tokenizer_settings
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.errors import UserError
from tpipe_jax.files import writing_to
from tpipe_jax.interop import gpt2
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.reporting.workdir import write_config
from tpipe_jax.training.health import new_health
from tpipe_jax.training.loss_scale import new_loss_scale
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state

PARAMS = "params/"
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"


def import_gpt2(source: Path, workdir: Path) -> Config:
    """Makes a workdir from a Hugging Face folder, and returns its config.

    The checkpoint of step 0 has the weights of the folder, and config.json its model. Raises
    `UserError` if the folder has no model that can be imported, or if the workdir is not empty.
    """
    model = gpt2.read_model(source)
    read = gpt2.Reader(source, model)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir={workdir} is not empty: choose a folder for a new run.")
    config = resolved(Config(model=model))
    with writing_to(workdir):
        is_new = not workdir.exists()
        try:
            write_checkpoint(workdir / "checkpoints", 0, config.model, _parts(config, read))
            write_config(config, workdir)
        except BaseException:
            for path in workdir.iterdir() if workdir.exists() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if is_new and workdir.exists():
                workdir.rmdir()
            raise
    return config


def export_gpt2(workdir: Path, target: Path, step: int | None, tokenizer: str | None = None) -> int:
    """Writes the weights of a checkpoint as a folder that
    `transformers.GPT2LMHeadModel.from_pretrained` loads; returns the step.

    Takes the newest sound checkpoint if `step` is None, and the tokenizer of the run's settings if
    `tokenizer` is None. Writes no tokenizer if the run was trained on tokens of an unknown one.
    Raises `UserError` if there is no sound
    checkpoint, if its layers are not GPT-2's, or if `target` is not empty or cannot be written.
    """
    checkpoint, model = newest_sound(workdir, step)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to={target} is not empty: choose a folder that is new.")
    if model.block != GPT2:
        raise UserError(
            f"--workdir={workdir} has layers of config.model.block={model.block}, which "
            "Hugging Face's GPT-2 has not: only runs with its own can be exported."
        )
    text = _tokenizer_text(workdir, tokenizer, model.vocab_size)
    target = target.absolute()
    saving = target.with_name(target.name + manifest.SAVING)
    try:
        saving.mkdir(parents=True)
        try:
            gpt2.write_model(
                saving, model, lambda name: read_array(checkpoint, PARAMS + name), gpt2.SHARD_BYTES
            )
            if text is not None:
                (saving / TOKENIZER).write_text(text)
                (saving / TOKENIZER_SETTINGS).write_text(tokenizer_settings(text, model.seq_len))
            saving.replace(target)
        finally:
            shutil.rmtree(saving, ignore_errors=True)
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


def _tokenizer_text(workdir: Path, name: str | None, vocab_size: int) -> str | None:
    """Returns the tokenizer.json of this name, or of the run's settings; None if it is unknown."""
    path, setting = workdir / RUN_FILE, "--tokenizer"
    if name is None:
        if not path.exists():
            return None
        name, setting = load_config(path).data.tokenizer, "config.data.tokenizer"
        if name == BYTES_NAME and vocab_size != BYTES:
            return None  # the run was trained on tokens of a tokenizer that it does not know
    made = hugging_face(setting, name)
    size = max(made.get_vocab().values()) + 1  # there may be gaps
    if size > vocab_size:
        raise UserError(
            f"{setting}={name} has {size} tokens, but the model has {vocab_size}: "
            "name its own with --tokenizer."
        )
    return made.to_str()


def _parts(config: Config, read: gpt2.Reader) -> Iterator[Fragment]:
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
