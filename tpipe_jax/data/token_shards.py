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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tpipe_jax.config.settings import BYTES_NAME
from tpipe_jax.data.documents import (
    JSON_LINES,
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    file_stat,
    read_documents,
)
from tpipe_jax.data.token_files import INDEX, MEGATRON
from tpipe_jax.data.tokenizer import Tokenizer, open_tokenizer
from tpipe_jax.errors import UserError
from tpipe_jax.files import locked

PARTIAL = ".partial"
PART_BYTES = 64 * 2**20  # bytes of input for one shard, if no document is longer
TOKENIZER = "tokenizer.json"
LARGEST = 2**16  # the largest vocabulary that fits into 16-bit tokens


@dataclass(frozen=True)
class ShardInput:
    """The documents of a shard: text files, one document each, or the records of one file; of JSON
    lines, some of them.
    """

    files: tuple[tuple[str, int, int], ...]
    """Path, size in bytes and time of change in ns of each file."""
    start: int
    """The byte at which the records begin, if there is one file of JSON lines."""
    stop: int


@dataclass(frozen=True)
class Result:
    """What a shard holds."""

    name: str
    num_documents: int
    num_tokens: int


def make_shards(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: str,
    field: str,
    num_workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Tokenizes all documents; returns the shards. A shard that an earlier call has left behind is
    kept if its input files, the field and the tokenizer have not changed.

    Raises `UserError` if an input cannot be read, a document has no text, or `out` exists already.
    """
    if out.exists():
        raise UserError(f"--out={out} is there already: choose another folder, or remove it.")
    parts = cut(find_files(inputs))
    out = out.absolute()
    partial = out.with_name(out.name + PARTIAL)
    vocab_size = open_tokenizer("--tokenizer", tokenizer).vocab_size
    content = b"" if tokenizer == BYTES_NAME else Path(tokenizer).read_bytes()
    how = {"field": field, "tokenizer": hashlib.sha256(content).hexdigest()}
    busy = f"another command is at work on --out={out}: wait for its end, or stop it."
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(os.open(partial, os.O_RDONLY), busy, is_needed=True):
            results = _results(parts, partial, tokenizer, how, num_workers, on_progress)
        (partial / TOKENIZER).unlink(missing_ok=True)
        if content:
            (partial / TOKENIZER).write_bytes(content)
        about = {
            "format": 1,
            "tokenizer": TOKENIZER if content else BYTES_NAME,
            "vocab_size": vocab_size,
            "shards": [asdict(result) for result in results],
        }
        (partial / INDEX).write_text(json.dumps(about, indent=1) + "\n")
        for path in partial.glob("*.json"):
            if path.name not in (INDEX, TOKENIZER):
                path.unlink()
        partial.rename(out)
    except OSError as error:
        raise UserError(
            f"cannot write --out={out} ({error.strerror}: {error.filename}): make room, or choose "
            "another folder; the same command goes on."
        ) from None
    return results


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Returns the files named, and those below the folders named, in order. Raises `UserError` if
    there are none.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            found += [f for f in files if f.suffix.lower() in (*TEXT_SUFFIXES, *RECORD_SUFFIXES)]
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path} is neither a file nor a folder: name text to tokenize.")
    if not found:
        raise UserError(
            f"{', '.join(map(str, inputs))} has no file that ends in "
            f"{', '.join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))}: name text to tokenize."
        )
    return found


def cut(files: Sequence[Path]) -> list[ShardInput]:
    """Cuts files into parts of about equal size: some text files, or some JSON lines. Any other
    file of records is one part.
    """
    parts: list[ShardInput] = []
    files_of_part: list[tuple[str, int, int]] = []

    def close() -> None:
        if files_of_part:
            parts.append(ShardInput(tuple(files_of_part), 0, 0))
            files_of_part.clear()

    num_bytes = 0
    for path in files:
        stat = file_stat(path)
        file = str(path.resolve()), stat.st_size, stat.st_mtime_ns
        if path.suffix.lower() in RECORD_SUFFIXES:
            close()
            is_cut = path.suffix.lower() == JSON_LINES
            bounds = [*(_line_starts(path, stat.st_size) if is_cut else [0]), stat.st_size]
            parts += [ShardInput((file,), a, b) for a, b in itertools.pairwise(bounds) if a < b]
        else:
            num_bytes += stat.st_size
            if files_of_part and num_bytes > PART_BYTES:
                close()
                num_bytes = stat.st_size
            files_of_part.append(file)
    close()
    return parts


def texts(part: ShardInput, field: str) -> Iterator[str]:
    """Yields the documents of a part. Raises `UserError` for a document that is empty, cannot be
    read, or has a prompt: tokens do not mark prompts, so it would be learnt too.
    """
    for name, _, _ in part.files:
        stop = part.stop or None
        for document in read_documents(Path(name), field, part.start, stop):
            if document.prompt:
                raise UserError(
                    f"{name} has prompts, which tokens cannot tell from what is to be learnt: "
                    f"train on the file itself, with config.data.train={name}."
                )
            yield document.text


def _results(
    parts: Sequence[ShardInput],
    folder: Path,
    tokenizer: str,
    how: dict[str, str],
    num_workers: int,
    on_progress: Callable[[int, int], None],
) -> list[Result]:
    results: list[Result | None] = [_left_behind(folder, i, p, how) for i, p in enumerate(parts)]
    todo = [i for i, result in enumerate(results) if result is None]
    done = len(parts) - len(todo)
    on_progress(done, len(parts))
    # Not forked, since threads of the libraries that are imported here may hold locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        max(min(num_workers, len(todo)), 1), context, _open_in_worker, (tokenizer,)
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


_tokenizer: Tokenizer | None = None  # of a worker process


def _open_in_worker(value: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel already
    _tokenizer = open_tokenizer("--tokenizer", value)


def _end_with_parent() -> None:
    """Ends this worker when its parent ends, so that none is at work beside the workers of the next
    call.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_shard(folder: Path, index: int, part: ShardInput, how: dict[str, str]) -> Result:
    """Writes a shard. Its last file describes the input; with this file the shard is complete."""
    assert _tokenizer is not None
    is_short = _tokenizer.vocab_size <= LARGEST
    dtype, code = (np.dtype("<u2"), 8) if is_short else (np.dtype("<i4"), 4)
    name, lengths = f"{index:05}", []
    end = [] if _tokenizer.end is None else [_tokenizer.end]
    with (folder / f"{name}.bin").open("wb") as file:
        for text in texts(part, how["field"]):
            tokens = np.concatenate([_tokenizer.encode(text), end]).astype(dtype)
            lengths.append(len(tokens))
            file.write(tokens.tobytes())
    sizes = np.array(lengths, "<i4")
    starts = (np.cumsum(sizes, dtype=np.int64) - sizes) * dtype.itemsize
    index_content = MEGATRON + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    bounds = np.arange(len(sizes) + 1, dtype="<i8")
    index_content += sizes.tobytes() + starts.astype("<i8").tobytes() + bounds.tobytes()
    (folder / f"{name}.idx").write_bytes(index_content)
    result = Result(name, len(lengths), int(sizes.sum()))
    made_of = json.dumps({"part": asdict(part), "how": how, "result": asdict(result)})
    (folder / f"{name}.json.new").write_text(made_of)
    (folder / f"{name}.json.new").rename(folder / f"{name}.json")
    return result


def _left_behind(folder: Path, index: int, part: ShardInput, how: dict[str, str]) -> Result | None:
    """Returns the result of an earlier call for the same part, made in the same way, if there is
    one.
    """
    try:
        known = json.loads((folder / f"{index:05}.json").read_text())
        if known["how"] != how or known["part"] != json.loads(json.dumps(asdict(part))):
            return None
        return Result(**known["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _line_starts(path: Path, size: int) -> Iterator[int]:
    """Yields where parts begin: at byte 0, and at the first line that begins at or after each
    multiple of PART_BYTES.
    """
    yield 0
    with path.open("rb") as file:
        for at in range(PART_BYTES, size, PART_BYTES):
            file.seek(at - 1)
            file.readline()
            yield min(file.tell(), size)
