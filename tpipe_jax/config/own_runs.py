"""Which runs are the user's own, and what the files of all other runs may not do. No jax.

A run that is downloaded is a stranger's, and so is one that was moved or edited: nobody can tell
the difference. So each run of the user notes the digest of its config.json in the user's own state
folder, where no downloaded file is. Without such a note, no path in a config.json is opened unless
the user names it, and no link may lead out of the run's folder.
"""

import hashlib
import os
import shlex
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tpipe_jax.config.settings import BYTES_NAME, Config, DataConfig
from tpipe_jax.errors import UserError, shown

RUN_FILE = "config.json"  # the settings of a run, in its workdir
KEPT = "tokenizer.json"  # the tokenizer of a run, in its workdir
CHECKPOINTS = "checkpoints"  # in a workdir

# Settings that name files or places, with the values that name none.
_NO_PLACES: dict[str, tuple[str | None, ...]] = {
    "data.train": (DataConfig.train,),
    "data.eval": (None, DataConfig.train),
    "data.tokenizer": (BYTES_NAME,),
    "plan.file": (None,),
    "metrics.wandb": (None,),
    "metrics.port": (None,),
}
PLACES = tuple(_NO_PLACES)


def record_run(workdir: Path, content: bytes) -> None:
    """Notes that this user's run writes this content as config.json of a workdir. Where the state
    folder cannot be written, nothing is noted, and paths have to be named again next time.

    The note is written before the file. So it keeps the digest before, which is still that of the
    file if this process is killed in between.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        note = _note_of(workdir)
        digests = [hashlib.sha256(content).hexdigest(), *_digests(note)[:1]]
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, new = tempfile.mkstemp(prefix=f"{note.name}.", dir=note.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write("\n".join(dict.fromkeys(digests)) + "\n")
            os.replace(new, note)
        except BaseException:
            os.unlink(new)
            raise


def is_own(config_file: Path) -> bool:
    """Whether a run of this user has written exactly this config.json, in this folder."""
    if config_file.name != RUN_FILE:
        return False
    try:
        digests = _digests(_note_of(config_file.parent))
        return bool(digests) and _digest_of(config_file) in digests
    except (OSError, RuntimeError):
        return False


def check_named(config_file: Path, config: Config, remedies: Mapping[str, str]) -> None:
    """Raises `UserError` if a stranger's config.json names a file, or a project that gets numbers,
    in one of these settings, which the user has not named again.

    `remedies` says for each setting, as data.train, how to name a value `{}`.
    """
    for setting, remedy in remedies.items():
        section, _, name = setting.partition(".")
        value = getattr(getattr(config, section), name)
        is_kept = setting == "data.tokenizer" and value == str(config_file.parent / KEPT)
        if value in _NO_PLACES[setting] or is_kept or is_own(config_file):
            continue
        raise UserError(
            f"{config_file} has config.{setting}={shown(value)}, which is only used if you name "
            "it, since no run of yours has written that file as it is: "
            f"{remedy.format(shown(shlex.quote(str(value))))}, or what you want instead."
        )


def with_kept(config_file: Path, config: Config) -> str | None:
    """Returns the path of the tokenizer in the folder of a stranger's config.json, if the settings
    name one and the folder has it: so the path in the settings is not needed.
    """
    kept = config_file.parent / KEPT
    if config.data.tokenizer == BYTES_NAME or not kept.is_file() or is_own(config_file):
        return None
    return str(kept)


def check_links(workdir: Path) -> None:
    """Raises `UserError` if a stranger's run has a link that leads out of its folder: what is read
    or written there would be a file of the user.

    The files of a single checkpoint are not looked at, since its manifest allows no links.
    """
    is_run = any(os.path.lexists(workdir / name) for name in (RUN_FILE, CHECKPOINTS))
    if not is_run or is_own(workdir / RUN_FILE):
        return
    root = os.path.realpath(workdir)
    steps = os.path.join(str(workdir), CHECKPOINTS)
    for folder, folders, files in os.walk(workdir):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            target = os.path.realpath(path)
            if os.path.islink(path) and os.path.commonpath([root, target]) != root:
                raise UserError(
                    f"{shown(path)} is a link to {shown(target)}, out of the folder of a run that "
                    "no run of yours has written as it is: put what it leads to in its place, or "
                    "remove it."
                )
        if folder == steps:
            folders.clear()


def _note_of(workdir: Path) -> Path:
    """Raises RuntimeError if there is no home folder."""
    given = os.environ.get("XDG_STATE_HOME", "")
    state = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    name = hashlib.sha256(os.fsencode(os.path.realpath(workdir))).hexdigest()
    return state / "tpipe_jax" / "runs" / name


def _digests(note: Path) -> list[str]:
    try:
        return note.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
