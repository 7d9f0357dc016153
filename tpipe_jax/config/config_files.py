"""Settings from files: shipped configs, Python files, and the config.json of a run. No jax."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tpipe_jax.config.own_runs import RUN_FILE, check_links, check_named, with_kept
from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import Config, from_dict, unresolved
from tpipe_jax.config.user_code import load_file
from tpipe_jax.errors import UserError, shown
from tpipe_jax.json_files import read_json

# An installed package has the folder inside, a checkout beside it.
_PLACES = [Path(__file__).resolve().parents[n] / "configs" for n in (1, 2)]
CONFIGS = next((place for place in _PLACES if place.is_dir()), _PLACES[0])


def find_config(name: str) -> Path:
    """Returns the file of a config that is named by its path, or by the name of a shipped one.

    Raises `UserError` if there is no such file.
    """
    path, shipped = expanded("--config", name), CONFIGS / f"{name}.py"
    if "/" not in name and shipped.is_file():
        return shipped
    if path.is_dir() and (path / RUN_FILE).is_file():
        return path / RUN_FILE
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("[!_]*.py")))
        raise UserError(
            f"--config={name} is no file: give a config file, the config.json of a run, or one of "
            f"{known}."
        )
    return path


def load_config(path: Path) -> Config:
    """Returns the settings in a run's config.json, or runs a Python file and returns the settings
    that its `get_config()` returns.

    Raises `UserError` if the file does not give settings, or if it is a stranger's and a link leads
    out of its folder.
    """
    if path.suffix == ".json":
        if path.name == RUN_FILE:
            check_links(path.parent)
        try:
            return unresolved(from_dict(read_json(path)))
        except (UserError, ValueError, AttributeError, TypeError, OSError) as error:
            raise UserError(f"--config={path} is not the config.json of a run ({error}).") from None
    if path.suffix != ".py":
        raise UserError(
            f"--config={path} is not a Python file: its name must end in .py, or .json."
        )
    try:
        config = load_file(path).get_config()
    except UserError:
        raise
    except Exception as error:  # any error of the file's code is for its author to mend
        raise UserError(
            f"--config={path} cannot be used ({type(error).__name__}: {error}): "
            "it must define get_config() -> Config."
        ) from error
    if not isinstance(config, Config):
        raise UserError(f"--config={path}: get_config() must return a tpipe_jax.config.Config.")
    return config


def check_block_is_named(path: Path, config: Config, is_named: bool) -> None:
    """Raises `UserError` if a run's config.json names a block that the user has not named again.

    A block is code, and a run may come from somebody else.
    """
    block = shown(config.model.block)
    if path.suffix == ".json" and config.model.has_own_block and not is_named:
        raise UserError(
            f"{path} has config.model.block={block}{_digest_of_block(path.parent)}, which is code "
            f"and is only loaded if you name it: read the file, then add "
            f"--config.model.block={block}."
        )


def _digest_of_block(run: Path) -> str:
    """Returns what the newest checkpoint of a run says of the file of its block; empty if it says
    nothing. It is a hint for the reader, and nothing is decided by it.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        folders = [path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
        newest = max(folders, key=lambda path: int(path.name))
        digest = read_json(newest / "manifest.json")["block"]
        if isinstance(digest, str) and len(digest) == 64:
            return f" (of SHA-256 {shown(digest)})"
    return ""


def with_named_places(
    path: Path, config: Config, named: Iterable[str], used: Iterable[str]
) -> Config:
    """Returns the settings of a config file, of which a command uses those in `used` and the user
    has named those in `named` again, as data.train.

    A stranger's config.json gets the tokenizer in its own folder, if there is one. Raises
    `UserError` if it names files elsewhere that the user has not named.
    """
    if path.suffix != ".json":
        return config
    left = [setting for setting in used if setting not in set(named)]
    kept = with_kept(path, config) if "data.tokenizer" in left else None
    if kept is not None:
        config = replace(config, data=replace(config.data, tokenizer=kept))
    flags = {name: f"add --config.{name.replace('_', '-')}={{}}" for name in left}
    check_named(path, config, flags)
    return config
