"""Which files a path stands for: folders, patterns, pairs, lists, and what is passed over."""

from pathlib import Path

import numpy as np
import pytest

from support.text_data import settings
from support.token_files import megatron
from tpipe_jax.config.settings import DataConfig
from tpipe_jax.data.batches import Batches, open_data
from tpipe_jax.data.find import find
from tpipe_jax.data.sources import open_shares, open_source
from tpipe_jax.errors import UserError


def token_file(path: Path, first: int, number: int = 200) -> None:
    (first + np.arange(number) % 50).astype("<u2").tofile(path)


def ids(batches: Batches) -> set[int]:
    return set(np.concatenate([batches.batch(i) for i in range(8)]).ravel().tolist())


@pytest.mark.parametrize(
    ("train", "val", "others"),
    [
        ("train.bin", "val.bin", ["readme.md", "prepare.py"]),  # nanoGPT's layout
        ("x_train_000001.bin", "x_val_000000.bin", ["x.py"]),  # llm.c's
        ("train.npy", "validation.npy", []),
    ],
)
def test_a_folder_of_token_files(train: str, val: str, others: list[str], tmp_path: Path):
    """Its readme is not trained on, and what is named so is held out."""
    for name, first in ((train, 300), (val, 400)):
        if name.endswith("npy"):
            np.save(tmp_path / name, first + np.arange(200) % 50)
        else:
            token_file(tmp_path / name, first)
    for name in others:
        (tmp_path / name).write_text("how these files were made\n" * 20)
    batches, held_out = open_data(settings(tmp_path, vocab_size=500))
    assert ids(batches) == set(range(300, 350))
    assert ids(held_out) == set(range(400, 450))
    assert (batches.num_tokens, held_out.num_tokens) == (200, 200)
    notes = [note.removeprefix(f"config.data.train={tmp_path}: ") for note in batches.notes]
    number = {0: [], 1: ["1 file passed over"], 2: ["2 files passed over"]}[len(others)]
    passed = [f"{text} ({', '.join(sorted(others))})" for text in number]
    assert notes == [*passed, f"{val} not trained on, as the name says"]
    assert held_out.notes == [
        f"config.data.train={tmp_path}: the held-out part is {val}, as the name says"
    ]


def test_test_data_are_not_looked_at_if_others_are_held_out(tmp_path: Path):
    for name, first in (("train.bin", 300), ("test.bin", 400), ("val.bin", 200)):
        token_file(tmp_path / name, first)
    found = find("x", str(tmp_path))
    assert found
    assert [path.name for path in found.held_out] == ["val.bin"]
    assert [path.name for path in found.passed_over] == ["test.bin"]
    (tmp_path / "val.bin").unlink()
    found = find("x", str(tmp_path))
    assert found
    assert [path.name for path in found.held_out] == ["test.bin"]


def test_held_out_data_may_be_named_by_its_folder(tmp_path: Path):
    token_file(tmp_path / "train.bin", 300)
    token_file(tmp_path / "val.bin", 400)
    shares = open_shares("x", str(tmp_path), 500, DataConfig(), is_held_out=True)
    assert shares[0].source.read(0, 1).tolist() == [400]
    config = settings(tmp_path / "train.bin", tmp_path, vocab_size=500)
    assert ids(open_data(config)[1]) == set(range(400, 450))


def test_text_beside_tokens_that_are_not_named_is_refused(tmp_path: Path):
    token_file(tmp_path / "a.bin", 0)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match=r"has files of text, as b.txt, and of tokens, as a.bin"):
        open_data(settings(tmp_path))


def test_patterns_and_pairs(tmp_path: Path):
    for i in range(3):
        token_file(tmp_path / f"part_{i}.bin", 100 * i, 10)
    source = open_source("x", str(tmp_path / "part_[02]*.bin"), 300, DataConfig())
    assert source.read(0, 20).tolist() == [*range(10), *range(200, 210)]
    megatron(tmp_path / "corpus_text_document.bin", "<u2", 8)
    assert len(open_source("x", str(tmp_path / "corpus_text_document"), 700, DataConfig())) == 1000
    with pytest.raises(UserError, match=r"other\* does not exist"):
        open_source("x", str(tmp_path / "other*"), 300, DataConfig())


def test_many_sources_with_weights(tmp_path: Path):
    """Together their names are longer than a name may be."""
    names = [tmp_path / f"shard_{i:03}.bin" for i in range(40)]
    for i, name in enumerate(names):
        token_file(name, 50 * i, 50)
    value = ",".join(f"{name}:{i + 1}" for i, name in enumerate(names))
    shares = open_shares("config.data.train", value, 2000, DataConfig())
    assert [share.weight for share in shares] == list(range(1, 41))
    assert [int(share.source.read(0, 1)[0]) for share in shares] == [50 * i for i in range(40)]
    names[7].unlink()
    with pytest.raises(UserError, match=r"shard_007.bin does not exist"):
        open_shares("config.data.train", value, 2000, DataConfig())


def test_sources_in_a_file(tmp_path: Path):
    """Their paths start from its folder."""
    (tmp_path / "data").mkdir()
    for i in range(2):
        token_file(tmp_path / "data" / f"{i}.bin", 50 * i, 50)
    mixture = tmp_path / "data" / "mixture.txt"
    mixture.write_text("# two parts\n0.bin:3\n\n1.bin:0.5\n")
    shares = open_shares("config.data.train", f"@{mixture}", 200, DataConfig())
    assert [(share.weight, int(share.source.read(0, 1)[0])) for share in shares] == [
        (3, 0),
        (0.5, 50),
    ]
    mixture.write_text("0.bin\n")
    with pytest.raises(UserError, match=r"has a source .*0.bin without a weight"):
        open_shares("config.data.train", f"@{mixture}", 200, DataConfig())
    mixture.write_text("\n")
    with pytest.raises(UserError, match=r"lists no sources"):
        open_shares("config.data.train", f"@{mixture}", 200, DataConfig())
    with pytest.raises(UserError, match=r"=@nowhere cannot be read"):
        open_shares("config.data.train", "@nowhere", 200, DataConfig())


def test_links_to_folders_are_followed_and_hidden_files_are_not_read(tmp_path: Path):
    """A link that leads back is followed once."""
    for folder in ("real", "top/.ipynb_checkpoints", "top/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "real" / "a.txt").write_text("behind a link")
    (tmp_path / "top" / "b.txt").write_text("in the folder")
    (tmp_path / "top" / "._b.txt").write_bytes(b"\0\5\x16\7\0\2")
    (tmp_path / "top" / ".ipynb_checkpoints" / "b.txt").write_text("a copy")
    (tmp_path / "top" / "lnk").symlink_to(tmp_path / "real")
    (tmp_path / "top" / "deep" / "back").symlink_to(tmp_path / "top")
    found = find("x", str(tmp_path / "top"))
    assert found
    assert [str(path.relative_to(tmp_path)) for path in found.files] == [
        "top/b.txt",
        "top/lnk/a.txt",
    ]
    assert not found.passed_over


def test_what_is_passed_over_is_counted_and_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text")
    for name in "bcdef":
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG")
    (tmp_path / "settings.json").write_text('{"name": 1}')
    found = find("x", str(tmp_path))
    assert found
    assert found.notes("x") == ["x: 6 files passed over (b.png, c.png, d.png, ...)"]


def test_empty_files_are_skipped_and_counted_or_refused(tmp_path: Path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("x = 1  # text")
    source = open_source("x", str(tmp_path), 256, DataConfig())
    assert bytes(source.read(0, len(source)).tolist()) == b"x = 1  # text"
    assert source.notes == [f"x={tmp_path}: skipped 1 empty file"]
    with pytest.raises(UserError, match=r"__init__.py is empty: remove it, or set"):
        open_source("x", str(tmp_path), 256, DataConfig(on_empty="refuse"))


def test_home_folders_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert len(open_source("x", "~/a.txt", 256, DataConfig())) == 7
    for address in ("gs://bucket/a.txt", "s3://bucket/a", "https://x.org/a.txt:0.5,b.bin:0.5"):
        with pytest.raises(UserError, match=r"is an address, and only files are read"):
            open_shares("x", address, 256, DataConfig())
