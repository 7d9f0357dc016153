"""What tests of forged files share: strategies that forge JSON, and a watch on what readers do.

    with watched(folder, outside) as seen, bounded_memory():
        read(folder)
    assert not seen

`folder` is what readers may open. `outside` holds files that a forged file names and none may open.
"""

import copy
import ctypes
import json
import os
import resource
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# ------------------------------------------------------------------------------ what readers do

_PACKAGE = Path(__file__).parents[2]
_CODE = tuple(  # of Python, the installed packages, this package and its tests
    {
        *(os.path.realpath(path) for path in sysconfig.get_paths().values()),
        *(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)),
        str(_PACKAGE / "tpipe_jax"),
        str(_PACKAGE / "tests"),
        str(_PACKAGE / "configs"),
    }
)
_ALLOWED = (
    *_CODE,
    "/proc",
    "/sys",
    "/dev",
    "/usr/share",
    "/usr/lib",
    "/lib",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/fonts",
    "/var/cache/fontconfig",
    str(_PACKAGE / ".pytest_cache"),  # of jax's programs too
    str(_PACKAGE / ".hypothesis"),
    str(Path.home() / ".cache"),
    str(Path.home() / ".config" / "matplotlib"),
    str(Path.home() / ".matplotlib"),
)
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"}
_LEAVES = {"socket.connect", "socket.getaddrinfo", "urllib.Request"}
_LINKS = {"os.link", "os.symlink", "os.rename", "os.remove", "os.truncate", "os.chmod"}


def _is_below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


@dataclass
class _Watch:
    """What the audit hook looks at while it is active. The hook itself cannot be taken away."""

    forged: tuple[str, ...] = ()  # folders of forged files
    allowed: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)
    is_active: bool = False
    is_installed: bool = False

    def install(self) -> None:
        if not self.is_installed:
            sys.addaudithook(self.look)
            self.is_installed = True

    def look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_active:
            return
        self.is_active = False  # what is done here is not looked at
        try:
            if said := self._wrong(event, args):
                self.seen.append(said)
        finally:
            self.is_active = True

    def _wrong(self, event: str, args: tuple[Any, ...]) -> str | None:
        if event == "open":
            return self._wrong_path(event, args[0])
        if event in ("os.listdir", "os.scandir") or event in _LINKS:
            return self._wrong_path(event, args[0])
        if event in ("exec", "compile"):
            name = args[0].co_filename if event == "exec" else args[1]
            return self._wrong_code(event, name)
        if event == "import":
            return self._wrong_code(event, args[1])
        if event == "ctypes.dlopen":
            return self._wrong_code(event, args[0])
        if event in _STARTS or event in _LEAVES or event == "pickle.find_class":
            return f"{event} {args!r:.200}"
        return None

    def _wrong_path(self, event: str, path: Any) -> str | None:
        if path is None or isinstance(path, int):  # of a file that is open already
            return None
        resolved = os.path.realpath(os.fsdecode(path))
        return None if _is_below(resolved, self.allowed) else f"{event} {path!r} = {resolved}"

    def _wrong_code(self, event: str, name: Any) -> str | None:
        if not name or not isinstance(name, str | bytes):
            return None
        resolved = os.path.realpath(os.fsdecode(name))
        return f"{event} {name!r}" if _is_below(resolved, self.forged) else None


_WATCH = _Watch()
_IN_OPEN = 0x20  # of Linux's inotify


@contextmanager
def _opened(folder: Path, seen: list[str]) -> Iterator[None]:
    """Adds to `seen` each file below `folder` that any code opens, of C++ and Rust too."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    try:
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                libc.inotify_add_watch(descriptor, os.fsencode(path), _IN_OPEN)
        yield
        try:
            events = os.read(descriptor, 2**16)
        except BlockingIOError:
            events = b""
        while events:
            _, _, _, length = struct.unpack_from("iIII", events)
            name = events[16 : 16 + length].rstrip(b"\0").decode()
            if name:  # else the folder itself, which a search for links may list
                seen.append(f"opened {name!r} in {folder}")
            events = events[16 + length :]
    finally:
        os.close(descriptor)


@contextmanager
def watched(
    folder: Path, outside: Path | None = None, allowed: tuple[Path, ...] = ()
) -> Iterator[list[str]]:
    """Yields a list, which has each thing done inside that no forged file may bring about.

    These are files opened, listed, renamed or removed that are neither below `folder`, `allowed`,
    nor parts of Python, installed packages and the system; modules and code of `folder`; other
    programs and connections. Files below `outside` are seen when C++ or Rust opens them, too; what
    they open elsewhere is not seen.
    """
    seen: list[str] = []
    _WATCH.install()
    _WATCH.forged = (os.path.realpath(folder),)
    _WATCH.allowed = (
        *_WATCH.forged,
        *_ALLOWED,
        *(os.path.realpath(path) for path in allowed),
    )
    _WATCH.seen = seen
    if outside is None:
        _WATCH.is_active = True
        try:
            yield seen
        finally:
            _WATCH.is_active = False
        return
    with _opened(outside, seen):
        _WATCH.is_active = True
        try:
            yield seen
        finally:
            _WATCH.is_active = False


# --------------------------------------------------------------------------------------- memory


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def bounded_memory(growth: int = 2**30, hard_growth: int = 2**32) -> Iterator[None]:
    """Asserts that the peak of memory grows by less than `growth`. Requests for more than
    `hard_growth` fail, so that a mistake ends no other program on this machine.
    """
    before = peak_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + hard_growth, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = peak_bytes() - before
    assert grown < growth, f"memory grew by {grown / 2**20:.0f} MiB"


# ----------------------------------------------------------------------------------- forged JSON


class Raw(str):
    """A text that is put into JSON as it is."""


NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**9, 10**12, 10**30, -0.0, 0.5, 1.0, 2.0, 1e-320, 1e15, 1e308, -1e308,
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e400"), Raw("-1e400"), Raw("1E5"),
    Raw("9" * 4000), Raw("9" * 5000), Raw("0." + "9" * 5000),
]  # fmt: skip
TEXTS: list[Any] = [
    "", "x", "0", "1", "1.5", "true", "null", "nan", "²", "\x00", "\ud800", "a\nb", "/", ".", "..",
    "None", "1" * 5000, "a" * 100_000, "\U0001f600", "\u202eabc", "{0.__class__}", "%s%n", "[red]x",
    "<f4", "|O", "O", "__class__", "__import__('os').system('touch forged')",
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, False, [], {}, [[]], [None], [0], {"": 0}, [[0.5]], {"x": {}}, [True, False],
    Raw("[" * 90 + "]" * 90), Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 2000 + "0" + "}" * 2000),
    Raw("[" + "0," * 100_000 + "0]"), Raw("[" + "[]," * 100_000 + "[]]"),
]  # fmt: skip
FILES = [
    "../outside/secret.json",
    "../outside",
    "/etc/passwd",
    "/etc",
    "/dev/zero",
    "/proc/self/mem",
]


def paths_to(outside: Path) -> list[str]:
    """Names of files that no forged file may have opened; `outside` holds `secret.json`."""
    secret = str(outside / "secret.json")
    return [
        *FILES,
        secret,
        str(outside),
        f"./{secret}",
        f"x/../../{outside.name}/secret.json",
        f"file://{secret}",
        f"{secret}\x00.json",
        "~/.bashrc",
        "$HOME/.bashrc",
        "a" * 300,
        "a/" * 3000,
        "CON",
        "gs://bucket/x",
        "http://127.0.0.1:9/x",
    ]


def outside_of(folder: Path) -> Path:
    """Makes a folder beside `folder` with files that none may open."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.json").write_text('{"secret": 1}')
    (outside / "secret.py").write_text("raise SystemExit('a forged file was executed')\n")
    return outside


def nodes(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value in JSON."""
    yield path
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from nodes(value, (*path, key))


def at(content: Any, path: tuple) -> Any:
    """The value at a path."""
    for key in path:
        content = content[key]
    return content


def dumped(content: Any) -> bytes:
    """JSON in which each `Raw` stands as it is."""
    raw: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value)
            return f"@@raw{len(raw) - 1}@@"
        if isinstance(value, dict):
            return {key: marked(inner) for key, inner in value.items()}
        return [marked(inner) for inner in value] if isinstance(value, list) else value

    text = json.dumps(marked(content))
    for index, value in enumerate(raw):
        text = text.replace(f'"@@raw{index}@@"', value)
    return text.encode()


def values(files: list[str] | None = None) -> st.SearchStrategy[Any]:
    """Values of all types that a forged file may hold where another belongs."""
    return st.one_of(
        *map(st.sampled_from, (NUMBERS, TEXTS, OTHERS, files or FILES)),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
    ).map(copy.deepcopy)  # since what is drawn is changed again


@st.composite
def forged_json(draw: st.DrawFn, content: Any, files: list[str] | None = None) -> bytes:
    """The JSON text of a value of which one to three parts are replaced, left out, repeated, added,
    renamed, put into each other or given twice; or of which bytes are changed.
    """
    text = json.dumps(content)
    content = json.loads(text)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        content = draw(_forged_once(content, files))
    made = dumped(content)
    if draw(st.integers(0, 9)) == 0:
        made = draw(forged_bytes(made))
    elif draw(st.integers(0, 9)) == 0:
        made = _with_key_twice(made, draw)
    return made


@st.composite
def _forged_once(draw: st.DrawFn, content: Any, files: list[str] | None) -> Any:
    path = draw(st.sampled_from(list(nodes(content))))
    value = at(content, path)
    how = draw(st.sampled_from(["value", "value", "near", "drop", "repeat", "add", "name", "wrap"]))
    if how == "near" and isinstance(value, int | float) and not isinstance(value, bool):
        value = draw(st.sampled_from([value + 1, value - 1, -value, value * 1000, float(value),
                                      value + 0.5, str(value), bool(value), [value]]))  # fmt: skip
    elif how == "repeat" and isinstance(value, list) and value:
        value = (value * draw(st.sampled_from([2, 3, 1000])))[:100_000]
    elif how == "add" and isinstance(value, dict):
        name = draw(st.sampled_from(["x", "", "__class__", "self", *(files or FILES)]))
        value = {**value, name: draw(values(files))}
    elif how == "add" and isinstance(value, list):
        value = [*value, draw(values(files))]
    elif how == "name" and isinstance(value, dict) and value:
        old = draw(st.sampled_from(sorted(value)))
        new = draw(st.sampled_from(["x", "", old.upper(), f"{old} ", *sorted(value)]))
        value = {new if key == old else key: inner for key, inner in value.items()}
    elif how == "wrap":
        value = draw(st.sampled_from([[value], {"x": value}, [[value]], [value, value]]))
    elif how == "drop" and path:
        holder = at(content, path[:-1])
        del holder[path[-1]]
        return content
    else:
        value = draw(values(files))
    if not path:
        return value
    at(content, path[:-1])[path[-1]] = value
    return content


def _with_key_twice(text: bytes, draw: st.DrawFn) -> bytes:
    """With one more member in front of the first object's, of a name that it has."""
    start = text.find(b'{"')
    end = text.find(b'":', start)
    if start < 0 or end < 0:
        return text
    name = text[start + 1 : end + 1]
    value = dumped(draw(values()))
    return text[: start + 1] + name + b": " + value + b", " + text[start + 1 :]


@st.composite
def forged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, longer, or with a few bytes changed."""
    changed = bytearray(content)
    how = draw(st.sampled_from(["cut", "bytes", "more"]))
    if how == "cut" or not changed:
        return bytes(changed[: draw(st.integers(0, len(changed)))])
    if how == "more":
        return bytes(changed) + draw(st.binary(min_size=1, max_size=100))
    for at_byte in draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=3)):
        changed[at_byte] = draw(st.integers(0, 255))
    return bytes(changed)


# -------------------------------------------------------------------------------- forged folders


def link_to(path: Path, target: Path | str) -> None:
    """Puts a link in the place of a file or folder."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def temporary_folder() -> str:
    """Where programs put files of their own, which `watched` may be told to allow."""
    return tempfile.gettempdir()
