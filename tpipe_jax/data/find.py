"""Finds the files that a path stands for: a file, a folder, a pattern, or the prefix of a pair."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from tpipe_jax.config.paths import expanded
from tpipe_jax.data.contents import TOKEN_SUFFIXES, has_text_records, is_candidate
from tpipe_jax.errors import UserError

MOST_NAMED = 3  # files that are named where many are passed over
_PATTERN = re.compile(r"[*?\[]")
# How nanoGPT and llm.c name the files of a data set: train.bin and val.bin, x_train_000001.bin.
_TRAIN, _VAL, _TEST = (
    re.compile(rf"(?:^|[_.-])(?:{names})(?:[_.-]|$)", re.IGNORECASE)
    for names in ("train|training", "val|valid|validation|eval|dev", "test")
)


@dataclass(frozen=True)
class Found:
    """The files that a path stands for."""

    files: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    """Files that are named as those to hold out, which are not among the others."""
    passed_over: tuple[Path, ...] = ()
    """Files in folders that are not read."""

    def notes(self, folder: str) -> list[str]:
        """Returns a line on what is passed over, if anything is."""
        if not self.passed_over:
            return []
        names = [path.name for path in self.passed_over[:MOST_NAMED]]
        more = ", ..." * (len(self.passed_over) > MOST_NAMED)
        number = len(self.passed_over)
        files = "1 file" if number == 1 else f"{number:,} files"
        return [f"{folder}: {files} passed over ({', '.join(names)}{more})"]


def find(name: str, value: str, field: str = "text", for_tokens: bool = True) -> Found | None:
    """Returns the files that a setting's value stands for; None if there is no such path.

    A folder stands for the text and records below it, or, where it has token files and they are
    asked for, for these. Links to folders are followed. What is hidden is left out. Raises
    `UserError` for an address, and OSError if a folder cannot be read.
    """
    path = expanded(name, value)
    if not value:
        return None
    if _exists(path):
        return _in_folder(path, field, for_tokens) if path.is_dir() else Found((path,))
    if _PATTERN.search(value):
        files = sorted(Path(own) for own in glob(str(path), recursive=True))
        files = [own for own in files if own.is_file() and own.suffix != ".idx"]
        return _divided(files, ()) if files else None
    prefix = str(path)
    is_pair = all(os.path.isfile(prefix + suffix) for suffix in (".bin", ".idx"))
    return Found((Path(prefix + ".bin"),)) if is_pair else None


def files_below(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder by path, but for hidden ones; no folder twice."""
    seen: set[tuple[int, int]] = set()

    def below(folder: Path) -> Iterator[Path]:
        stat = folder.stat()
        if (stat.st_dev, stat.st_ino) in seen:  # a link that leads back
            return
        seen.add((stat.st_dev, stat.st_ino))
        for path in sorted(folder.iterdir(), key=lambda path: str(path)):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from below(path)
            elif path.is_file():
                yield path

    return below(folder)


def _in_folder(folder: Path, field: str, for_tokens: bool) -> Found:
    files = list(files_below(folder))
    tokens = [path for path in files if path.suffix.lower() in TOKEN_SUFFIXES]
    texts = [path for path in files if _is_text(path, field)]
    if tokens and for_tokens:
        if texts and not any(_TRAIN.search(path.stem) for path in tokens):
            raise UserError(
                f"{folder} has files of text, as {texts[0].name}, and of tokens, as "
                f"{tokens[0].name}: name those to read, as {folder}/*{tokens[0].suffix}."
            )
        # .idx files belong to the .bin beside them.
        pairs = {path.with_suffix(".idx") for path in tokens}
        others = [path for path in files if path not in {*tokens, *pairs}]
        return _divided(tokens, others)
    return Found(tuple(texts), passed_over=tuple(path for path in files if path not in set(texts)))


def _is_text(path: Path, field: str) -> bool:
    """Whether a file in a folder is read: text or records, by its name. Of .json files, which are
    often something else, those that have records are.
    """
    if not is_candidate(path):
        return False
    if ".json" in [suffix.lower() for suffix in path.suffixes]:
        try:
            return has_text_records(path, field)
        except UserError:
            return False
    return True


def _divided(files: Sequence[Path], others: Sequence[Path]) -> Found:
    """Returns files, with those apart that are named as held-out ones beside training ones."""
    val, test, named = (
        [path for path in files if names.search(path.stem)] for names in (_VAL, _TEST, _TRAIN)
    )
    held_out = val or test  # test data are not looked at if there are others
    named = [path for path in named if path not in {*val, *test}]
    if not named or not held_out:
        return Found(tuple(files), passed_over=tuple(others))
    rest = [path for path in files if path not in {*named, *held_out}]
    return Found(tuple(named), tuple(held_out), (*rest, *others))


def _exists(path: Path) -> bool:
    """Whether there is such a path; there is none of a name that is too long. Raises OSError if
    that cannot be told.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
    return True
