"""The folder of a run's checkpoints: which ones it has, and which are undamaged. No jax.

    checkpoints/500/                a finished checkpoint, named by its step
    checkpoints/500/manifest.json   its settings, and size and SHA-256 of every other file
    checkpoints/500/manifest.sha256 SHA-256 of the manifest
    checkpoints/500.saving/         a checkpoint being written, or left so by a killed run
    checkpoints/500.removing/       an old checkpoint being removed
    checkpoints/500.damaged/        a checkpoint that was found damaged and put aside

A checkpoint gets its final name in one step, when all its files are on the disk. So a checkpoint
with a final name was whole at that time. If it differs from its manifest, it was damaged later.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tpipe_jax.files import sync
from tpipe_jax.json_files import parse_json

MANIFEST, MANIFEST_DIGEST = "manifest.json", "manifest.sha256"
FORMAT = 1
SAVING, REMOVING, DAMAGED = ".saving", ".removing", ".damaged"
READERS = 8  # files that are read at the same time

Digests = dict[str, tuple[int, str]]  # path below the checkpoint: bytes and SHA-256


class DamagedError(Exception):
    """A checkpoint is damaged; says in a few words how."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint belongs to, and which files it is made of."""

    format: int
    step: int
    identity: dict[str, Any]
    """The settings that the checkpoint is bound to, nested as in `Config`."""
    files: Digests
    """All files but the manifest and its digest."""
    data: dict[str, int] | None = None
    """`sequences` that were read up to this step, and `tokens` of the training data; None in older
    checkpoints, and in those of imported weights."""
    block: str | None = None
    """SHA-256 of the file of a block of the user's own; None for GPT-2's, and in older
    checkpoints."""


def list_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, the newest first."""
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted((int(name) for name in names if _STEP.fullmatch(name)), reverse=True)


def finish_times(folder: Path) -> list[float]:
    """Returns when the finished checkpoints were finished, the newest first, as times of the
    clock.
    """
    return [(folder / str(step) / MANIFEST_DIGEST).stat().st_mtime for step in list_steps(folder)]


def num_bytes(checkpoint: Path) -> int:
    """Returns the bytes of all files of a checkpoint."""
    return sum(path.lstat().st_size for path in _files(checkpoint))


def digest(content: bytes | memoryview) -> str:
    """Returns the SHA-256 of a content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file; returns when its content is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno(), "files")


def finish(
    saving: Path,
    step: int,
    identity: dict[str, Any],
    files: Digests,
    data: dict[str, int] | None = None,
    block: str | None = None,
) -> None:
    """Writes the manifest of a checkpoint of these files, and gives the checkpoint its final name.

    Raises `FileNotFoundError` if one of the files is missing, `FileExistsError` if there are
    others.
    """
    found = set(_names(saving))
    if missing := sorted(files.keys() - found):
        raise FileNotFoundError(f"{missing[0]} has gone")
    if foreign := sorted(found - files.keys()):
        raise FileExistsError(f"{_shown(foreign[0])} is of somebody else")
    manifest = Manifest(FORMAT, step, identity, dict(sorted(files.items())), data, block)
    fields = asdict(manifest)
    if block is None:
        del fields["block"]
    content = json.dumps(fields, indent=1).encode() + b"\n"
    write_file(saving / MANIFEST, content)
    write_file(saving / MANIFEST_DIGEST, f"{digest(content)}  {MANIFEST}\n".encode())
    for folder in (*(path for path in saving.rglob("*") if path.is_dir()), saving):
        _sync_folder(folder)
    saving.rename(saving.with_name(str(step)))
    _sync_folder(saving.parent)


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads the manifest of a checkpoint. Raises `DamagedError` if it is not as it was written, or
    if it is none.
    """
    names = {path.name for path in checkpoint.iterdir()}
    for name in (MANIFEST, MANIFEST_DIGEST):
        if name not in names:
            raise DamagedError(f"{name} is missing")
        _check_regular(checkpoint, name)
    content = (checkpoint / MANIFEST).read_bytes()
    expected = f"{digest(content)}  {MANIFEST}\n".encode()
    if (checkpoint / MANIFEST_DIGEST).read_bytes() != expected:
        raise DamagedError(f"{MANIFEST} or {MANIFEST_DIGEST} has changed")
    try:
        manifest = Manifest(**parse_json(content))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{MANIFEST} is none ({error})") from None
    _check_types(manifest)
    if manifest.format != FORMAT or str(manifest.step) != checkpoint.name.partition(".")[0]:
        raise DamagedError(f"{MANIFEST} is of step {manifest.step} in format {manifest.format}")
    return replace(manifest, files={name: tuple(about) for name, about in manifest.files.items()})


def _check_types(manifest: Manifest) -> None:
    """Raises `DamagedError` if a value has the wrong type."""
    for name, hint in {"format": int, "step": int, "identity": dict, "files": dict}.items():
        if type(getattr(manifest, name)) is not hint:
            raise DamagedError(f"{MANIFEST} is none (its {name} has the wrong type)")
    for name, about in manifest.files.items():
        if not (
            isinstance(about, list)
            and len(about) == 2
            and _is_count(about[0])
            and _is_digest(about[1])
        ):
            raise DamagedError(f"{MANIFEST} is none (it has no size and digest of {_shown(name)})")
    data, block = manifest.data, manifest.block
    if data is not None and not (
        isinstance(data, dict)
        and data.keys() == {"sequences", "tokens"}
        and all(map(_is_count, data.values()))
    ):
        raise DamagedError(f"{MANIFEST} has no numbers of sequences and tokens")
    if block is not None and not _is_digest(block):
        raise DamagedError(f"{MANIFEST} has no digest of a block")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def check(checkpoint: Path, reader: int = 0, num_readers: int = 1) -> Manifest:
    """Returns the manifest of a checkpoint, after comparing the files with it. The names of all
    files are compared. Reader number `reader` of `num_readers` compares its share of the contents.

    Raises `DamagedError`, which names a file that differs.
    """
    manifest = read_manifest(checkpoint)
    found = set(_names(checkpoint))
    for name in sorted(manifest.files.keys() - found):
        raise DamagedError(f"{_shown(name)} is missing")
    for name in sorted(found - manifest.files.keys()):
        raise DamagedError(f"{_shown(name)} does not belong to it")

    def check_file(name: str) -> None:
        _check_regular(checkpoint, name)
        size, expected = manifest.files[name]
        with (checkpoint / name).open("rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise DamagedError(f"{name} has {actual} bytes instead of {size}")
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise DamagedError(f"{name} has changed")

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(check_file, sorted(manifest.files)[reader::num_readers]))
    return manifest


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint. Renames it first, so that an interruption leaves no half one of that
    name.
    """
    removing = checkpoint.with_name(checkpoint.name + REMOVING)
    checkpoint.rename(removing)
    _delete(removing)


def put_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, to put it out of the way; returns its new path."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}{DAMAGED}-{number}")
    checkpoint.rename(aside)
    return aside


def clean(folder: Path) -> None:
    """Removes checkpoints that a killed run has left half written or half removed."""
    for path in folder.iterdir():
        if _STEP.fullmatch(path.stem) and path.suffix in (SAVING, REMOVING):
            _delete(path)


_STEP = re.compile("0|[1-9][0-9]*")
_DIGEST = re.compile("[0-9a-f]{64}")


def _delete(path: Path) -> None:
    if path.is_symlink():  # a user may have moved it to another disk
        path.unlink()
    else:
        shutil.rmtree(path)


def _check_regular(checkpoint: Path, name: str) -> None:
    if not stat.S_ISREG((checkpoint / name).lstat().st_mode):
        raise DamagedError(f"{_shown(name)} is no regular file")


def _shown(name: str) -> str:
    """Returns a name as it can be printed, since damage may have changed it too."""
    return name if name.isprintable() else ascii(name)


def _names(checkpoint: Path) -> list[str]:
    """Returns the names of all files but the manifest and its digest."""
    names = (path.relative_to(checkpoint).as_posix() for path in _files(checkpoint))
    return [name for name in names if name not in (MANIFEST, MANIFEST_DIGEST)]


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir()]


def _sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor, "names in a folder")
    finally:
        os.close(descriptor)
