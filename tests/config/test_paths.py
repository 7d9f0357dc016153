"""Paths as users write them: `~`, and addresses, which are refused."""

from pathlib import Path

import pytest

from tpipe_jax.config.command_line import (
    parse,
    parse_convert,
    parse_generate,
    parse_plan,
    parse_tokenize,
)
from tpipe_jax.config.paths import expanded
from tpipe_jax.errors import UserError


def test_the_home_folder_has_a_short_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["--workdir=~/run"], "p").workdir == tmp_path / "run"
    assert parse_tokenize(["--out=~/shards", "a"], "p").out == tmp_path / "shards"
    (tmp_path / "c.py").write_text(
        "from tpipe_jax.config import Config\ndef get_config():\n    return Config()\n"
    )
    assert parse(["--config=~/c.py"], "p").workdir == Path("runs/c")
    assert expanded("x", "~/a") == tmp_path / "a"


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "https://x.org/a"])
def test_addresses_are_no_folders(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    calls = [
        lambda: parse([f"--workdir={address}"], "p"),
        lambda: parse_plan([f"--workdir={address}"], "p"),
        lambda: parse_generate([f"--workdir={address}", "--prompt=x"], "p"),
        lambda: parse_convert(["export", f"--workdir={address}", "--to=x"], "p"),
        lambda: parse_convert(["export", "--workdir=x", f"--to={address}"], "p"),
        lambda: parse_tokenize([f"--out={address}", "a"], "p"),
        lambda: parse([f"--config={address}"], "p"),
        lambda: expanded("config.data.train", address),
    ]
    for call in calls:
        with pytest.raises(UserError, match=rf"={address} is an address, and only files are read"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_folder_may_be_called_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    assert expanded("x", "s3:/") == Path("s3:")
