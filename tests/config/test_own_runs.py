"""What a stranger's run may not do: name files elsewhere, or lead out of its folder by links."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tpipe_jax.config.command_line import parse, parse_compile, parse_doctor, parse_plan
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.own_runs import check_links, is_own
from tpipe_jax.config.settings import Config, from_dict, resolved, to_dict
from tpipe_jax.errors import UserError
from tpipe_jax.reporting.workdir import changed_settings, note_config, write_config


def a_config(**values: str | None) -> Config:
    """Values by their names with two underscores, as data__train."""
    content = to_dict(resolved(Config()))
    for name, value in values.items():
        section, _, field = name.partition("__")
        content[section][field] = value
    return from_dict(content)


def downloaded(folder: Path, config: Config | None = None) -> Path:
    """A run of which nothing is noted here."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config or a_config()), indent=2) + "\n")
    return folder


PLACES = {
    "file": ("data__train", "/etc/passwd"),
    "relative": ("data__train", "../secret.txt"),
    "home": ("data__train", "~/.ssh/id_ed25519"),
    "pattern": ("data__train", "/etc/pass*"),
    "prefix of a pair": ("data__train", "/data/shards_00000"),
    "list": ("data__train", "@/etc/passwd"),
    "several": ("data__train", "pydocs:1,/etc/passwd:1"),
    "list in the folder": ("data__train", "@{run}/mixture.txt"),
    "link in the folder": ("data__train", "{run}/data/link.txt"),
    "held out": ("data__eval", "/etc/passwd"),
    "tokenizer": ("data__tokenizer", "/etc/passwd"),
    "plan": ("plan__file", "/etc/passwd"),
    "project": ("metrics__wandb", "theirs"),
    "port": ("metrics__port", 9400),
    "escape": ("data__train", "/etc/\x1b[2Jpasswd"),
}


@pytest.mark.parametrize(("name", "value"), PLACES.values(), ids=PLACES)
def test_a_stranger_names_no_place(tmp_path: Path, name: str, value: str | int):
    if isinstance(value, str):
        value = value.format(run=tmp_path / "run")
    run = downloaded(tmp_path / "run", a_config(**{name: value}))
    (run / "mixture.txt").write_text("/etc/passwd:1\n")
    setting = f"config.{name.replace('__', '.')}"
    for args in ([f"--workdir={run}"], [f"--config={run}"], [f"--config={run}/config.json"]):
        for parsed in (parse, parse_plan):
            with pytest.raises(UserError) as error:
                parsed(args, "program")
            assert f"{setting}=" in str(error.value)
            assert f": add --{setting}=" in str(error.value)
            assert str(error.value).isprintable()
    own = parse([f"--workdir={run}", f"--{setting}={value}"], "program").config
    assert own == load_config(run / "config.json")  # the user has named it


def test_only_what_a_command_uses_has_to_be_named(tmp_path: Path):
    run = downloaded(tmp_path / "run", a_config(data__train="/etc/passwd", data__eval="/etc/group"))
    parse_doctor([f"--workdir={run}"], "program")
    parse_compile([f"--workdir={run}", "--gpu=h100"], "program")
    with pytest.raises(UserError, match=r"config\.data\.eval=/etc/group"):
        parse([f"--workdir={run}", "--config.data.train=mine.txt"], "program")


def test_the_users_own_run_names_what_it_likes(tmp_path: Path):
    config, run = a_config(data__train="/etc/passwd", metrics__wandb="mine"), tmp_path / "run"
    run.mkdir()
    write_config(config, run)
    assert parse([f"--workdir={run}"], "program").config.data.train == "/etc/passwd"
    (tmp_path / "way").symlink_to(run)
    assert is_own(tmp_path / "way" / "config.json")
    note_config(a_config(), run)  # killed before it has written the file
    assert is_own(run / "config.json")


CHANGES: dict[str, Callable[[Path], Path]] = {
    "edited": lambda run: (write_over(run / "config.json"), run)[1],
    "moved": lambda run: run.rename(run.with_name("moved")),
    "copied": lambda run: Path(shutil.copytree(run, run.with_name("copy"))),
    "other name": lambda run: (run / "config.json").rename(run / "own.json"),
    "in its place": lambda run: (shutil.rmtree(run), downloaded(run, a_run_config()))[1],
}


def a_run_config() -> Config:
    return a_config(data__train="/etc/group")


def write_over(path: Path) -> None:
    path.write_text(path.read_text().replace("/etc/passwd", "/etc/shadow"))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_is_a_strangers_when_it_is_changed(tmp_path: Path, change: Callable[[Path], Path]):
    run = tmp_path / "run"
    run.mkdir()
    write_config(a_config(data__train="/etc/passwd"), run)
    with pytest.raises(UserError, match=r"no run of yours has written that file as it is"):
        parse([f"--config={change(run)}"], "program")


def test_without_a_state_folder_nothing_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    for state in (tmp_path / "file", Path("/proc/none")):
        monkeypatch.setenv("XDG_STATE_HOME", str(state))
        write_config(a_config(data__train="/etc/passwd"), tmp_path)
        assert not is_own(tmp_path / "config.json")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which does not count
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_config(a_config(), tmp_path)
    [note] = (tmp_path / "home/.local/state/tpipe_jax/runs").iterdir()
    assert is_own(tmp_path / "config.json")
    note.write_bytes(b"\xff")
    assert not is_own(tmp_path / "config.json")


def test_a_stranger_keeps_its_tokenizer_in_its_folder(tmp_path: Path):
    run = downloaded(tmp_path / "run", a_config(data__tokenizer="/etc/passwd"))
    (run / "tokenizer.json").write_text("{}")
    config = parse([f"--workdir={run}"], "program").config
    assert config.data.tokenizer == str(run / "tokenizer.json")


LINKS = (
    "config.json",
    "plan.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "wandb.id",
    "checkpoints",
    "checkpoints/500",
    "checkpoints/500.saving",
    "meshes/1x2x1/latency.json",
    "nowhere",
)


@pytest.mark.parametrize("name", LINKS)
def test_no_link_leads_out_of_a_strangers_run(tmp_path: Path, name: str):
    run = downloaded(tmp_path / "run")
    (run / "inside").symlink_to("metrics.jsonl")
    check_links(run)
    outside = tmp_path / "outside"
    if name != "nowhere":
        outside.write_text((run / "config.json").read_text())
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(outside, path.parent))
    for use in (
        lambda: check_links(run),
        lambda: load_config(run / "config.json"),
        lambda: changed_settings(Config(), run),
        lambda: parse([f"--workdir={run}"], "program"),
    ):
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value).startswith(f"{path} is a link to {outside}, out of the folder")


def test_the_user_may_have_moved_checkpoints_to_another_disk(tmp_path: Path):
    run = tmp_path / "run"
    (tmp_path / "disk" / "500").mkdir(parents=True)
    run.mkdir()
    write_config(a_config(), run)
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    check_links(run)
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoints is a link to .*/disk, out of the folder"):
        check_links(run)


def test_nothing_is_written_through_a_link(tmp_path: Path):
    """Also in a folder that is no run yet."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.new").symlink_to(tmp_path / "mine")
    write_config(a_config(), tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.json").symlink_to(tmp_path / "missing")
    with pytest.raises(UserError, match=r"is not the folder of a run"):
        changed_settings(Config(), tmp_path / "other")
