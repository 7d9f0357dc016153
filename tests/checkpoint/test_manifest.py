"""What makes a folder a checkpoint, and how damage is named."""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tpipe_jax import files
from tpipe_jax.checkpoint import manifest

IDENTITY = {"model": {"d_model": 16}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path, 12)


CONTENTS = {"a/0.0": b"zero", "a/.zarray": b"{}", "step/0": b"\0" * 4}


def write(folder: Path, step: int) -> Path:
    saving = folder / f"{step}{manifest.SAVING}"
    for name, content in CONTENTS.items():
        (saving / name).parent.mkdir(parents=True, exist_ok=True)
        manifest.write_file(saving / name, content)
    return saving


def make(folder: Path, step: int) -> Path:
    digests = {name: (len(c), manifest.digest(c)) for name, c in CONTENTS.items()}
    manifest.finish(write(folder, step), step, IDENTITY, digests)
    return folder / str(step)


def test_only_a_whole_checkpoint_gets_its_name(tmp_path: Path):
    saving = write(tmp_path, 3)
    known = {name: (len(c), manifest.digest(c)) for name, c in CONTENTS.items()}
    with pytest.raises(FileExistsError, match="step/0 is of somebody else"):
        manifest.finish(saving, 3, IDENTITY, {n: d for n, d in known.items() if n != "step/0"})
    (saving / "a/0.0").unlink()
    with pytest.raises(FileNotFoundError, match=r"a/0\.0 has gone"):
        manifest.finish(saving, 3, IDENTITY, known)
    assert manifest.list_steps(tmp_path) == []


def test_a_checkpoint_is_as_it_was_written(checkpoint: Path):
    found = manifest.check(checkpoint)
    assert (found.step, found.identity) == (12, IDENTITY)
    assert {name: size for name, (size, _) in found.files.items()} == {
        "a/.zarray": 2,
        "a/0.0": 4,
        "step/0": 4,
    }
    own = sum(
        (checkpoint / f).stat().st_size for f in (manifest.MANIFEST, manifest.MANIFEST_DIGEST)
    )
    assert manifest.num_bytes(checkpoint) == 10 + own


def flip(path: Path, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


def forge(checkpoint: Path, content: str) -> None:
    """A manifest that is no manifest, with the digest that belongs to it."""
    manifest.write_file(checkpoint / manifest.MANIFEST, content.encode())
    line = f"{manifest.digest(content.encode())}  {manifest.MANIFEST}\n"
    manifest.write_file(checkpoint / manifest.MANIFEST_DIGEST, line.encode())


def swap(path: Path, put: Callable[[Path], object]) -> None:
    path.rename(path.parent.parent.parent / "kept")
    put(path)


def manifest_text(files_text: str) -> str:
    return f'{{"format": 1, "step": 12, "identity": {{}}, "files": {files_text}}}'


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda c: flip(c / "a/0.0"), "a/0.0 has changed"),
    "truncated": (lambda c: (c / "step/0").write_bytes(b"\0"), "step/0 has 1 bytes instead of 4"),
    "longer": (lambda c: (c / "step/0").write_bytes(b"\0" * 5), "step/0 has 5 bytes instead of 4"),
    "missing": (lambda c: (c / "a/.zarray").unlink(), "a/.zarray is missing"),
    "foreign": (lambda c: (c / "a/0.1").write_bytes(b"x"), "a/0.1 does not belong to it"),
    "strange name": (
        lambda c: Path(os.fsdecode(bytes(c / "a") + b"/\xff\n")).write_bytes(b"x"),
        r"'a/\udcff\n' does not belong to it",
    ),
    "link": (
        lambda c: swap(c / "a/0.0", lambda p: p.symlink_to(c.parent / "kept")),
        "a/0.0 is no regular file",
    ),
    "pipe": (lambda c: swap(c / "a/0.0", os.mkfifo), "a/0.0 is no regular file"),
    "folder": (lambda c: swap(c / "a/0.0", Path.mkdir), "a/0.0 is missing"),
    "no manifest": (lambda c: (c / manifest.MANIFEST).unlink(), "manifest.json is missing"),
    "no digest": (lambda c: (c / manifest.MANIFEST_DIGEST).unlink(), "manifest.sha256 is missing"),
    "empty": (
        lambda c: (c / manifest.MANIFEST).write_text(""),
        "manifest.json or manifest.sha256 has",
    ),
    "digest": (lambda c: flip(c / manifest.MANIFEST_DIGEST), "manifest.sha256 has changed"),
    "no JSON": (lambda c: forge(c, "\x00"), "manifest.json is none"),
    "list": (lambda c: forge(c, "[1]"), "manifest.json is none"),
    "deep": (lambda c: forge(c, "[" * 100000), "manifest.json is none"),
    "no pairs": (lambda c: forge(c, manifest_text('{"a": 1}')), "manifest.json is none"),
    "infinite": (lambda c: forge(c, manifest_text('{"a": [1e999, ""]}')), "manifest.json is none"),
    "outside": (
        lambda c: forge(c, manifest_text(f'{{"../../kept": [1, "{64 * "a"}"]}}')),
        "../../kept is missing",
    ),
    "another step": (lambda c: c.rename(c.with_name("13")), "manifest.json is of step 12"),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], object], text: str):
    damage(checkpoint)
    [path] = (path for path in checkpoint.parent.iterdir() if path.name != "kept")
    with pytest.raises(manifest.DamagedError) as error:
        manifest.check(path)
    assert text in str(error.value)


def test_each_bit_of_the_manifest_counts(checkpoint: Path):
    for name in (manifest.MANIFEST, manifest.MANIFEST_DIGEST):
        path = checkpoint / name
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            with pytest.raises(manifest.DamagedError):
                manifest.check(checkpoint)
        path.write_bytes(whole)
        manifest.check(checkpoint)


def test_processes_share_the_reading(checkpoint: Path):
    """Each file falls to one of them; names are looked at by all."""
    flip(checkpoint / "a/0.0")
    found = []
    for part in range(2):
        try:
            manifest.check(checkpoint, part, 2)
        except manifest.DamagedError as error:
            found.append(str(error))
    assert found == ["a/0.0 has changed"]
    (checkpoint / "step/0").unlink()
    for part in range(2):
        with pytest.raises(manifest.DamagedError, match="step/0 is missing"):
            manifest.check(checkpoint, part, 2)


def test_finished_checkpoints_are_listed(tmp_path: Path):
    for step in (5, 40, 300):
        make(tmp_path, step)
    (tmp_path / "7").write_text("a file")
    kept = ("9.damaged", "9.damaged-2", "notes", "notes.saving", "005")
    for name in ("9.saving", "9.removing", *kept):
        (tmp_path / name).mkdir()
    (tmp_path / "8.removing").symlink_to(tmp_path / "notes")
    assert manifest.list_steps(tmp_path) == [300, 40, 5]
    manifest.clean(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"5", "40", "300", "7", *kept}


def test_damaged_ones_are_put_aside_and_none_is_lost(tmp_path: Path):
    asides = []
    for n in range(3):
        path = make(tmp_path, 4)
        (path / "number").write_text(str(n))
        asides.append(manifest.put_aside(path))
    assert [path.name for path in asides] == ["4.damaged", "4.damaged-2", "4.damaged-3"]
    assert [(path / "number").read_text() for path in asides] == ["0", "1", "2"]


def test_what_is_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    path = make(tmp_path, 4)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.remove(path)
    assert manifest.list_steps(tmp_path) == []
    monkeypatch.undo()
    manifest.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_saved_where_folders_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    monkeypatch.setattr(files, "_noted", set())
    for step in (3, 4):
        assert manifest.check(make(tmp_path, step)).step == step
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: this file system cannot say when names in a folder are on the")
