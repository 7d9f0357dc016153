"""Tokenizes documents into a folder of token shards, in parallel, and goes on where it stopped.

    OUT/00000.bin, OUT/00000.idx    tokens in Megatron-LM's format, each document a sequence
    OUT/index.json                  the shards, in order, and the tokenizer
    OUT/tokenizer.json              the tokenizer, unless tokens are bytes

The inputs are cut into parts, and each part becomes a shard. So the result does not depend on the
number of workers. Until all shards are there, the folder is called OUT.partial.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import BYTES_NAME
from tpipe_jax.data.contents import content_of
from tpipe_jax.data.documents import HowToRead, Piece, file_stat, read_pieces
from tpipe_jax.data.encode import encoded
from tpipe_jax.data.end_token import SETTINGS, write_end
from tpipe_jax.data.end_token import end_token as find_end
from tpipe_jax.data.find import find
from tpipe_jax.data.token_files import INDEX, MEGATRON, open_shards
from tpipe_jax.data.tokenizer import Tokenizer, hugging_face, open_tokenizer, train_bpe
from tpipe_jax.errors import UserError
from tpipe_jax.files import locked
from tpipe_jax.json_files import read_json

PARTIAL = ".partial"
PART_BYTES = 64 * 2**20  # bytes of input for one shard, if no document is longer
AT_ONCE = 2**24  # tokens that are checked together
TOKENIZER = "tokenizer.json"
LARGEST = 2**16  # the largest vocabulary that fits into 16-bit tokens


@dataclass(frozen=True)
class ShardInput:
    """The documents of a shard: text files, one document each, or those of one file; of JSON lines,
    and of text with separators, some of them.
    """

    files: tuple[tuple[str, int, int], ...]
    """Path, size in bytes and time of change in ns of each file."""
    start: int
    """The byte at which the documents begin, if they are some of those of a file."""
    stop: int


@dataclass(frozen=True)
class Result:
    """What a shard holds."""

    name: str
    num_documents: int
    num_tokens: int
    skipped: dict[str, int] = field(default_factory=dict)
    """How many files and documents had no text."""


def make_shards(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: str | int,
    how_to_read: HowToRead,
    num_workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    end_token: str | None = None,
) -> list[Result]:
    """Tokenizes all documents; returns the shards. `tokenizer` is bytes, a tokenizer.json, or the
    number of tokens of one that is first learnt from the documents, and also written beside `out`.
    A shard that an earlier call has left behind is kept if its input files, the way to read them
    and the tokenizer have not changed.

    Raises `UserError` if an input cannot be read, no document has text, another command is at work
    on `out`, or `out` exists already.
    """
    there = f"--out={out} is there already: choose another folder, or remove it."
    if out.exists():
        raise UserError(there)
    parts = cut(find_files(inputs, how_to_read.field)[0], how_to_read)
    out = out.absolute()
    partial = out.with_name(out.name + PARTIAL)
    busy = f"another command is at work on --out={out}: wait for its end, or stop it."
    try:
        partial.mkdir(parents=True, exist_ok=True)
        # All of an output is written by one command: its tokenizer must be that of its tokens.
        with locked(os.open(partial, os.O_RDONLY), partial, busy):
            if out.exists():  # the other command has ended between the two
                raise UserError(there)
            worker = _prepared(tokenizer, end_token, parts, partial, out, how_to_read)
            results = _results(parts, partial, worker, num_workers, on_progress)
            if not any(result.num_tokens for result in results):
                raise UserError(
                    f"{', '.join(map(str, inputs))} has no text in it: name text to tokenize."
                )
            _publish(partial, out, worker, results)
    except OSError as error:
        raise UserError(
            f"cannot write --out={out} ({error.strerror}: {error.filename}): make room, or choose "
            "another folder; the same command goes on."
        ) from None
    return results


def _prepared(
    tokenizer: str | int,
    end: str | None,
    parts: Sequence[ShardInput],
    partial: Path,
    out: Path,
    how: HowToRead,
) -> "_Worker":
    """Puts the tokenizer into the folder. Returns what worker processes are told."""
    own = partial / TOKENIZER
    for name in (TOKENIZER, SETTINGS[0]):
        (partial / name).unlink(missing_ok=True)
    if tokenizer == BYTES_NAME:
        return _Worker(BYTES_NAME, how, open_tokenizer("--tokenizer", BYTES_NAME, end).end, None)
    if isinstance(tokenizer, int):
        documents = (piece.text for part in parts for piece in texts(part, how, Counter()))
        content = train_bpe(documents, tokenizer).to_str(pretty=True).encode()
        out.with_name(f"{out.name}.{TOKENIZER}").write_bytes(content)
        named = str(own)
    else:
        named = tokenizer
        hugging_face("--tokenizer", named)  # raises if it is none
        content = expanded("--tokenizer", named).read_bytes()
    own.write_bytes(content)
    made = hugging_face("--tokenizer", str(own))
    found = find_end(made, named, end)
    write_end(partial, made, found)
    return _Worker(str(own), how, found, hashlib.sha256(content).hexdigest())


def _publish(partial: Path, out: Path, worker: "_Worker", results: Sequence[Result]) -> None:
    """Completes the folder, and gives it its name."""
    if worker.digest is not None:
        content = (partial / TOKENIZER).read_bytes()
        if hashlib.sha256(content).hexdigest() != worker.digest:
            raise UserError(f"{partial / TOKENIZER} has changed meanwhile: run the command again.")
    about = {
        "format": 1,
        "tokenizer": BYTES_NAME if worker.digest is None else TOKENIZER,
        "vocab_size": open_tokenizer("--tokenizer", worker.tokenizer).vocab_size,
        "end": worker.end,
        "shards": [asdict(result) for result in results if result.num_tokens],
    }
    # Read once more, since an earlier call may have left some of them behind.
    for file in open_shards(f"--out={out}", partial, about, about["vocab_size"]):
        for start in range(0, len(file), AT_ONCE):
            own = file[start : start + AT_ONCE]
            if own.min() < 0 or own.max() >= about["vocab_size"]:
                raise UserError(
                    f"{file.path} has tokens that its tokenizer does not have: remove {partial}, "
                    "and run the command again."
                )
    (partial / INDEX).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for path in partial.glob("*.json"):
        if path.name not in (INDEX, TOKENIZER, SETTINGS[0]):
            path.unlink()
    partial.rename(out)


def find_files(inputs: Sequence[Path], field: str = "text") -> tuple[list[Path], list[str]]:
    """Returns the files named, and those below the folders named, in order; and lines on what is
    passed over. Raises `UserError` if there are none.
    """
    found: list[Path] = []
    notes: list[str] = []
    for path in inputs:
        own = find("the input", str(path), field, for_tokens=False)
        if own is None:
            raise UserError(f"{path} is neither a file nor a folder: name text to tokenize.")
        found += own.files
        notes += own.notes(str(path))
    if not found:
        passed = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(
            f"{', '.join(map(str, inputs))} has no file of text or records{passed}: name text to "
            "tokenize."
        )
    return found, notes


def cut(files: Sequence[Path], how: HowToRead) -> list[ShardInput]:
    """Cuts files into parts of about equal size: some text files, some JSON lines, or some
    documents of a text file that has separators. Any other file is one part.
    """
    parts: list[ShardInput] = []
    files_of_part: list[tuple[str, int, int]] = []

    def close() -> None:
        if files_of_part:
            parts.append(ShardInput(tuple(files_of_part), 0, 0))
            files_of_part.clear()

    num_bytes = 0
    for path in files:
        stat, content = file_stat(path), content_of(path, how.field)
        # Not resolved, since a link may have an ending that its target lacks.
        file = os.path.abspath(path), stat.st_size, stat.st_mtime_ns
        separator = how.separator if content.kind == "text" else None
        if content.is_records or separator is not None:
            close()
            ends = b"\n" if separator is None else separator.encode()
            is_cut = not content.packing and content.kind in ("JSON lines", "text")
            bounds = [*(_starts(path, stat.st_size, ends) if is_cut else [0]), stat.st_size]
            parts += [ShardInput((file,), a, b) for a, b in itertools.pairwise(bounds) if a < b]
        else:
            num_bytes += stat.st_size
            if files_of_part and num_bytes > PART_BYTES:
                close()
                num_bytes = stat.st_size
            files_of_part.append(file)
    close()
    return parts


def texts(part: ShardInput, how: HowToRead, skipped: Counter[str]) -> Iterator[Piece]:
    """Yields the documents of a part, in pieces. Raises `UserError` for a document that cannot be
    read, or has a prompt: tokens do not mark prompts, so it would be learnt too.
    """
    for name, _, _ in part.files:
        stop = part.stop or None
        content = content_of(Path(name), how.field)
        stop = None if content.packing or content.kind not in ("JSON lines", "text") else stop
        for piece in read_pieces(Path(name), how, skipped, part.start, stop):
            if not piece.is_learnt:
                raise UserError(
                    f"{name} has prompts, which tokens cannot tell from what is to be learnt: "
                    f"train on the file itself, with config.data.train={name}."
                )
            yield piece


def _results(
    parts: Sequence[ShardInput],
    folder: Path,
    worker: "_Worker",
    num_workers: int,
    on_progress: Callable[[int, int], None],
) -> list[Result]:
    how = worker.as_made
    results: list[Result | None] = [_left_behind(folder, i, p, how) for i, p in enumerate(parts)]
    todo = [i for i, result in enumerate(results) if result is None]
    done = len(parts) - len(todo)
    on_progress(done, len(parts))
    # Not forked, since threads of the libraries that are imported here may hold locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        max(min(num_workers, len(todo)), 1), context, _open_in_worker, (worker,)
    ) as pool:
        tasks = {pool.submit(_write_shard, folder, i, parts[i], how): i for i in todo}
        try:
            for task in as_completed(tasks):
                results[tasks[task]] = task.result()
                done += 1
                on_progress(done, len(parts))
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenizes was ended, perhaps for lack of memory: the same command "
                "goes on, and needs less with a smaller --num-workers."
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [result for result in results if result is not None]


class _Worker(NamedTuple):
    """What a worker process is told."""

    tokenizer: str
    how: HowToRead
    end: int | None
    """The token that ends a document."""
    digest: str | None
    """Of the tokenizer's file."""

    @property
    def as_made(self) -> dict[str, Any]:
        """What the tokens depend on, beside the input."""
        return {**self.how._asdict(), "end": self.end, "tokenizer": self.digest}


_tokenizer: Tokenizer | None = None  # of a worker process
_how, _end = HowToRead(), np.array([], np.int32)


def _open_in_worker(worker: _Worker) -> None:
    global _tokenizer, _how, _end
    for number in (signal.SIGINT, signal.SIGHUP):  # the parent gets them too, and ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel already
    _tokenizer = open_tokenizer("--tokenizer", worker.tokenizer)
    _how, _end = worker.how, np.array([] if worker.end is None else [worker.end], np.int32)


def _end_with_parent() -> None:
    """Ends this worker when its parent ends, so that none is at work beside the workers of the next
    call.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_shard(folder: Path, index: int, part: ShardInput, how: dict[str, Any]) -> Result:
    """Writes a shard. Its last file describes the input; with this file the shard is complete."""
    assert _tokenizer is not None
    is_short = _tokenizer.vocab_size <= LARGEST
    dtype, code = (np.dtype("<u2"), 8) if is_short else (np.dtype("<i4"), 4)
    name, lengths = f"{index:05}", []
    skipped = Counter[str]()
    with (folder / f"{name}.bin").open("wb") as file:
        size = 0
        for own in encoded(texts(part, _how, skipped), _tokenizer, part.files[0][0]):
            tokens = np.concatenate([own.tokens, _end] if own.ends else [own.tokens])
            assert tokens.max(initial=0) < _tokenizer.vocab_size
            tokens = tokens.astype(dtype)
            file.write(tokens.tobytes())
            size += len(tokens)
            if size >= 2**31:  # an index has no larger numbers
                raise UserError(f"{part.files[0][0]} has a document of 2^31 tokens: split it.")
            if own.ends:
                lengths.append(size)
                size = 0
    sizes = np.array(lengths, "<i4")
    starts = (np.cumsum(sizes, dtype=np.int64) - sizes) * dtype.itemsize
    index_content = MEGATRON + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    bounds = np.arange(len(sizes) + 1, dtype="<i8")
    index_content += sizes.tobytes() + starts.astype("<i8").tobytes() + bounds.tobytes()
    (folder / f"{name}.idx").write_bytes(index_content)
    result = Result(name, len(lengths), int(sizes.astype(np.int64).sum()), dict(skipped))
    made_of = json.dumps({"part": asdict(part), "how": how, "result": asdict(result)})
    (folder / f"{name}.json.new").write_text(made_of, encoding="utf-8")
    (folder / f"{name}.json.new").rename(folder / f"{name}.json")
    return result


def _left_behind(folder: Path, index: int, part: ShardInput, how: dict[str, Any]) -> Result | None:
    """Returns the result of an earlier call for the same part, made in the same way, if there is
    one.
    """
    try:
        known = read_json(folder / f"{index:05}.json")
        if known["how"] != how or known["part"] != json.loads(json.dumps(asdict(part))):
            return None
        return Result(**known["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _starts(path: Path, size: int, separator: bytes) -> Iterator[int]:
    """Yields where parts begin: at byte 0, and behind the first separator at or after each multiple
    of PART_BYTES.
    """
    yield 0
    last = 0
    with path.open("rb") as file:
        for at in range(PART_BYTES, size, PART_BYTES):
            if at < last:
                continue
            last = _behind(file, max(at - len(separator), 0), size, separator)
            yield last


def _behind(file: BinaryIO, start: int, size: int, separator: bytes) -> int:
    """Returns the byte behind the first separator from `start` on, or the size of the file."""
    file.seek(start)
    rest = b""
    while content := file.read(2**20):
        text = rest + content
        if (found := text.find(separator)) >= 0:
            return start + found + len(separator)
        keep = min(len(separator) - 1, len(text))
        rest, start = text[len(text) - keep :], start + len(text) - keep
    return size
