"""The folder of a run's checkpoints: which are there, and which are as they were written. No jax.

    checkpoints/500/                a finished checkpoint, named by its step
    checkpoints/500/manifest.json   what it belongs to, and size and SHA-256 of every other file
    checkpoints/500.saving/         one that is being written, or was when the run was killed
    checkpoints/500.removing/       an old one on its way out
    checkpoints/500.damaged/        one that was found damaged and put aside

A checkpoint gets its final name in one step, when all of it is on the disk. So what has that name
was whole, and what differs from its manifest has been damaged since.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
SAVING, REMOVING, DAMAGED = ".saving", ".removing", ".damaged"

Digests = dict[str, tuple[int, str]]  # path below the checkpoint: bytes and SHA-256


class DamagedError(Exception):
    """What is wrong with a checkpoint, in a few words."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, and what it is made of."""

    format: int
    step: int
    identity: dict[str, Any]
    """The settings that it is bound to, nested as in `Config`."""
    files: Digests


def list_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, the newest first."""
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def num_bytes(checkpoint: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in _files(checkpoint))


def digests(checkpoint: Path, names: Iterable[str]) -> Digests:
    """Size and digest of the named files."""
    names = list(names)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(_digest, (checkpoint / n for n in names)), strict=True))


def write_manifest(checkpoint: Path, step: int, identity: dict[str, Any], known: Digests) -> None:
    """Lists all files; those that are not `known` are read."""
    others = [name for name in _names(checkpoint) if name not in known]
    files = dict(sorted({**known, **digests(checkpoint, others)}.items()))
    content = asdict(Manifest(FORMAT, step, identity, files))
    text = json.dumps({"sha256": _of_content(content), **content}, indent=1) + "\n"
    with (checkpoint / MANIFEST).open("w") as file:
        file.write(text)
        sync(file.fileno())


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises `DamagedError` if it is not as it was written."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_bytes())
        sha256 = content.pop("sha256")
        manifest = Manifest(**content)
        files = {
            str(name): (int(size), str(digest)) for name, (size, digest) in manifest.files.items()
        }
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from None
    if sha256 != _of_content(content):
        raise DamagedError(f"{MANIFEST} has changed")
    if manifest.format != FORMAT or str(manifest.step) != checkpoint.name.partition(".")[0]:
        raise DamagedError(f"{MANIFEST} is of step {manifest.step} in format {manifest.format}")
    return Manifest(manifest.format, manifest.step, manifest.identity, files)


def check(checkpoint: Path, part: int = 0, num_parts: int = 1) -> Manifest:
    """The manifest of a checkpoint whose files are as it says; of several parts, one reads all
    files that fall to it.

    Raises `DamagedError`, which names a file.
    """
    manifest = read_manifest(checkpoint)
    found = set(_names(checkpoint))
    for name in sorted(manifest.files.keys() - found):
        raise DamagedError(f"{name} is missing")
    for name in sorted(found - manifest.files.keys()):
        raise DamagedError(f"{name} does not belong to it")
    own = sorted(manifest.files)[part::num_parts]
    for name, (size, digest) in digests(checkpoint, own).items():
        expected_size, expected_digest = manifest.files[name]
        if size != expected_size:
            raise DamagedError(f"{name} has {size} bytes instead of {expected_size}")
        if digest != expected_digest:
            raise DamagedError(f"{name} has changed")
    return manifest


def finish(saving: Path, step: int) -> None:
    """Gives a checkpoint its final name."""
    saving.rename(saving.with_name(str(step)))
    sync_folder(saving.parent)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint; whenever that is interrupted, it is there or it is not."""
    removing = checkpoint.with_name(checkpoint.name + REMOVING)
    checkpoint.rename(removing)
    shutil.rmtree(removing)


def put_aside(checkpoint: Path) -> Path:
    """Takes a damaged checkpoint out of the way; returns where it is then."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}{DAMAGED}-{number}")
    checkpoint.rename(aside)
    return aside


def clean(folder: Path) -> None:
    """Removes what a killed run has left half written or half removed."""
    for path in folder.iterdir():
        if path.is_dir() and path.suffix in (SAVING, REMOVING):
            shutil.rmtree(path)


def sync(descriptor: int) -> None:
    """Returns when what was written is on the disk."""
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Returns when the names of a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return os.fstat(file.fileno()).st_size, digest


def _of_content(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _names(checkpoint: Path) -> list[str]:
    """Of all files but the manifest."""
    names = (path.relative_to(checkpoint).as_posix() for path in _files(checkpoint))
    return [name for name in names if name != MANIFEST]


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.rglob("*") if not path.is_dir() or path.is_symlink()]
