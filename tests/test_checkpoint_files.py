"""What makes a folder a checkpoint, and how damage is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tpipe_jax import checkpoint_files as files

IDENTITY = {"model": {"d_model": 16}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path, 12)


def make(folder: Path, step: int) -> Path:
    saving = folder / f"{step}{files.SAVING}"
    for name, content in {"a/0.0": b"zero", "a/.zarray": b"{}", "step/0": b"\0" * 4}.items():
        (saving / name).parent.mkdir(parents=True, exist_ok=True)
        (saving / name).write_bytes(content)
    files.write_manifest(saving, step, IDENTITY, files.digests(saving, ["a/0.0"]))
    files.finish(saving, step)
    return folder / str(step)


def test_a_checkpoint_is_as_it_was_written(checkpoint: Path):
    manifest = files.check(checkpoint)
    assert (manifest.step, manifest.identity) == (12, IDENTITY)
    assert {name: size for name, (size, _) in manifest.files.items()} == {
        "a/.zarray": 2,
        "a/0.0": 4,
        "step/0": 4,
    }
    assert files.num_bytes(checkpoint) == 10 + (checkpoint / files.MANIFEST).stat().st_size


def flip(path: Path, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda c: flip(c / "a/0.0"), "a/0.0 has changed"),
    "truncated": (lambda c: (c / "step/0").write_bytes(b"\0"), "step/0 has 1 bytes instead of 4"),
    "longer": (lambda c: (c / "step/0").write_bytes(b"\0" * 5), "step/0 has 5 bytes instead of 4"),
    "missing": (lambda c: (c / "a/.zarray").unlink(), "a/.zarray is missing"),
    "foreign": (lambda c: (c / "a/0.1").write_bytes(b"x"), "a/0.1 does not belong to it"),
    "no manifest": (lambda c: (c / files.MANIFEST).unlink(), "manifest.json is missing"),
    "empty": (lambda c: (c / files.MANIFEST).write_text(""), "manifest.json cannot be read"),
    "list": (lambda c: (c / files.MANIFEST).write_text("[1]"), "manifest.json cannot be read"),
    "binary": (lambda c: (c / files.MANIFEST).write_bytes(b"\xff\x00"), "cannot be read"),
    "fields": (lambda c: (c / files.MANIFEST).write_text('{"sha256": ""}'), "cannot be read"),
    "another step": (lambda c: c.rename(c.with_name("13")), "manifest.json is of step 12"),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], object], text: str):
    damage(checkpoint)
    [path] = checkpoint.parent.iterdir()
    with pytest.raises(files.DamagedError) as error:
        files.check(path)
    assert text in str(error.value)


def test_each_bit_of_the_manifest_counts(checkpoint: Path):
    path = checkpoint / files.MANIFEST
    whole = path.read_bytes()
    content = json.loads(whole)
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            unharmed = json.loads(path.read_bytes()) == content  # white space
        except ValueError:
            unharmed = False
        if unharmed:
            files.check(checkpoint)
        else:
            with pytest.raises(files.DamagedError):
                files.check(checkpoint)


def test_processes_share_the_reading(checkpoint: Path):
    """Each file falls to one of them; names are looked at by all."""
    flip(checkpoint / "a/0.0")
    found = []
    for part in range(2):
        try:
            files.check(checkpoint, part, 2)
        except files.DamagedError as error:
            found.append(str(error))
    assert found == ["a/0.0 has changed"]
    (checkpoint / "step/0").unlink()
    for part in range(2):
        with pytest.raises(files.DamagedError, match="step/0 is missing"):
            files.check(checkpoint, part, 2)


def test_finished_checkpoints_are_listed(tmp_path: Path):
    for step in (5, 40, 300):
        make(tmp_path, step)
    (tmp_path / "7").write_text("a file")
    for name in ("9.saving", "9.removing", "9.damaged", "9.damaged-2", "notes"):
        (tmp_path / name).mkdir()
    assert files.list_steps(tmp_path) == [300, 40, 5]
    files.clean(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"5", "40", "300", "7", "9.damaged", "9.damaged-2", "notes"}


def test_damaged_ones_are_put_aside_and_none_is_lost(tmp_path: Path):
    asides = []
    for n in range(3):
        path = make(tmp_path, 4)
        (path / "number").write_text(str(n))
        asides.append(files.put_aside(path))
    assert [path.name for path in asides] == ["4.damaged", "4.damaged-2", "4.damaged-3"]
    assert [(path / "number").read_text() for path in asides] == ["0", "1", "2"]


def test_what_is_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    path = make(tmp_path, 4)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        files.remove(path)
    assert files.list_steps(tmp_path) == []
    monkeypatch.undo()
    files.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []
