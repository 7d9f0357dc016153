"""The command line: config files, overrides, and answers to mistakes."""

import dataclasses
import inspect
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from tpipe_jax.config.command_line import parse
from tpipe_jax.config.config_files import CONFIGS, load_config
from tpipe_jax.config.flags import ProcessFlags
from tpipe_jax.config.settings import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    from_dict,
    resolved,
    to_dict,
)
from tpipe_jax.errors import UserError
from tpipe_jax.reporting.workdir import write_config

BY_HAND = ("--coordinator=host:1234", "--num-processes=2")


def test_default_is_the_quick_start():
    flags = parse([], "program")
    assert flags.config == load_config(CONFIGS / "quickstart.py")
    assert flags.workdir == Path("runs/quickstart")


@pytest.mark.parametrize("spelling", ["num-layers", "num_layers"])
@pytest.mark.parametrize("form", ["--config.model.{}=7", "--config.model.{} 7"])
def test_overrides_take_both_spellings(spelling: str, form: str):
    flags = parse(form.format(spelling).split(), "program")
    quickstart = load_config(CONFIGS / "quickstart.py")
    model = dataclasses.replace(quickstart.model, num_layers=7)
    assert flags.config == dataclasses.replace(quickstart, model=model)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("true", True), ("True", True), ("false", False), ("False", False), ("None", None)],
)
def test_truth_values_take_both_spellings(word: str, expected: bool | None):
    config = parse([f"--config.optim.shard-state={word}"], "program").config
    assert config.optim.shard_state is expected


def test_config_file_names_the_workdir(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from tpipe_jax.config import Config, TrainConfig\n"
        "def get_config(): return Config(train=TrainConfig(seed=5))\n"
    )
    flags = parse([f"--config={path}", "--config.train.num-steps=3"], "program")
    assert (flags.config.train.seed, flags.config.train.num_steps) == (5, 3)
    assert flags.workdir == Path("runs/mine")
    assert parse(["--config", str(path), "--workdir=x"], "program").workdir == Path("x")


def test_help_lists_every_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "110")  # so that few texts are broken, and there is one column
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"], "program")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory()):  # pyrefly: ignore
            name = field.name.rstrip("_").replace("_", "-")  # a word of Python has one more
            assert f"--config.{section.name}.{name} " in text
    processes = ("workdir", "profile", *(field.name for field in dataclasses.fields(ProcessFlags)))
    for name in processes:
        assert f"--{name.replace('_', '-')} " in text
    sections = [field.default_factory() for field in dataclasses.fields(Config)]  # pyrefly: ignore
    num_settings = sum(len(dataclasses.fields(section)) for section in sections)
    assert text.count("(default: ") == num_settings + len(processes)
    assert all(inspect.getdoc(type(section))[:40] in text for section in sections)
    assert "(default: 0.9; at least 0 and below 1)" in " ".join(text.replace("│", " ").split())
    assert "program --workdir=runs/mine --config.optim.learning-rate=3e-4\n" in text


def test_a_field_named_by_a_word_of_python():
    flags = parse(["--config.checkpoint.async=false"], "program")
    assert flags.config.checkpoint.async_ is False
    assert parse([], "program").config.checkpoint.async_ is True


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--config.model.num-layer=3"], "--config.model.num-layers"),
        (["--wrkdir=x"], "--workdir"),
        (["--config.train.num-steps=many"], "--config.train.num-steps"),
        (["--config.precision.compute=float8"], "auto, float32, bfloat16, float16"),
        (["--config.optim.shard-state=maybe"], "=maybe must be true or false"),
        (["--config.train.num-steps=1.5"], "--config.train.num-steps=1.5 must be a whole number"),
        (["--config.optim.beta1=much"], "--config.optim.beta1=much must be a number, as 0.001"),
        (["--config.data.train"], "--config.data.train has no value"),
        (["--config.model.num-layers", "3", "4"], "there is nothing that 4 could mean"),
        (["--lr=1e-3"], "the setting is --config.optim.learning-rate;"),
        (["--config.optim.lr=1e-3"], "the setting is --config.optim.learning-rate;"),
        (["--learning_rate=1e-3"], "the setting is --config.optim.learning-rate;"),
        (["--batch-size", "8"], "the setting is --config.train.batch-size;"),
        (["--train.num-steps=8"], "the setting is --config.train.num-steps;"),
        (["--resume"], "--workdir=RUN goes on with the run in that folder;"),
        (["--gpus=4"], "the number of devices is the product of --config.mesh.data"),
        (["--epochs=4"], "length is counted in steps, by --config.train.num-steps;"),
        (["--micro-batch-size=4"], "=uniform:N cuts the batch of a data shard into N;"),
        (["--bf16"], "the setting is --config.precision.compute;"),
        (["--every=3"], "--config.checkpoint.every or --config.metrics.stage-times-every;"),
        (["--loss=3"], "it is not a setting of this command;"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_mistakes_in_flags_name_the_real_ones(
    args: list[str], expected: str, encoding: str, monkeypatch: pytest.MonkeyPatch
):
    """Also where the terminal cannot draw tyro's boxes."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(UserError) as error:
        parse(args, "program")
    assert expected in str(error.value)
    assert "program --help" in str(error.value)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--config.model.num-layers=0"], "config.model.num_layers=0 must be at least 1"),
        (["--config.optim.beta1=1"], "config.optim.beta1=1.0 must be at least 0 and below 1"),
        (
            ["--config.optim.learning-rate=nan"],
            "config.optim.learning_rate=nan must be a finite number",
        ),
        (
            ["--config.optim.learning-rate=inf"],
            "config.optim.learning_rate=inf must be a finite number",
        ),
        (["--config.model.seq-len=2147483648"], "seq_len=2147483648 must be at most 2147483647"),
        (["--config.data.held-out=0.7"], "config.data.held_out=0.7 must be between 0 and 0.5"),
        (["--config.model.num-heads=3"], "num_heads=3 does not divide config.model.d_model=128"),
        (["--config=configs/none.py"], "--config=configs/none.py is no file"),
        (["--config"], "--config= is no file"),
        (["--config=README.md"], "--config=README.md is not a Python file"),
        (["--config.mesh.order=pipe,model"], "config.mesh.order=pipe,model is no order of the"),
        (["--config.mesh.order=pipe,pipe,model"], "give one such as pipe,data,model"),
        (["--local-processes=0"], "--local-processes=0 must be at least 1"),
        (["--num-processes=2"], "--coordinator, --num-processes and --process-id belong together"),
        (["--process-id=0"], "--coordinator, --num-processes and --process-id belong together"),
        (["--local-processes=2", "--process-id=0"], "starts all processes itself: leave out"),
        ([*BY_HAND, "--coordinator=host", "--process-id=0"], "is not of the form HOST:PORT"),
        ([*BY_HAND, "--coordinator=host:70000", "--process-id=0"], "with a port below 65536"),
        ([*BY_HAND, "--process-id=2"], "--process-id=2 must be at least 0 and below"),
        ([*BY_HAND, "--process-id=0", "--join-seconds=0"], "--join-seconds=0 must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(args: list[str], sentence: str):
    with pytest.raises(UserError) as error:
        parse(args, "program")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = 1", "it must define get_config() -> Config"),
        ("def get_config(): return 1", "must return a tpipe_jax.config.Config"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("this is no Python", "SyntaxError"),
    ],
)
def test_broken_config_files_are_refused(code: str, sentence: str, tmp_path: Path):
    path = tmp_path / "broken.py"
    path.write_text(code)
    with pytest.raises(UserError, match=r"broken\.py") as error:
        load_config(path)
    assert sentence in str(error.value)


def test_wrong_types_in_code_are_refused():
    with pytest.raises(UserError, match=r"config\.model\.d_model='64' must be of type int"):
        Config(model=ModelConfig(d_model="64"))  # pyrefly: ignore
    with pytest.raises(UserError, match=r"config\.mesh\.pipe=True must be of type int"):
        Config(mesh=MeshConfig(pipe=True))


def test_config_survives_json():
    for path in CONFIGS.glob("*.py"):
        config = load_config(path)
        assert from_dict(to_dict(config)) == config
    with pytest.raises(UserError):
        from_dict({"model": {"depth": 3}})
    with pytest.raises(UserError):
        from_dict({"no_section": {}})


def test_configs_of_the_paper_have_its_shapes():
    """Table 1 of Li et al. 2021: layers, hidden size, heads, batch, data x pipe x op."""
    expected = {
        "gpt3_1b": (24, 2048, 16, 128, (8, 24, 1)),
        "gpt3_13b": (40, 5120, 40, 32, (1, 40, 8)),
        "gpt3_44b": (96, 6144, 48, 8, (1, 48, 8)),
        "gpt3_175b": (96, 12288, 96, 2, (1, 96, 4)),
    }
    for name, shape in expected.items():
        config = load_config(CONFIGS / f"{name}.py")
        model, mesh = config.model, config.mesh
        assert model.seq_len == 2048
        assert shape == (
            *(model.num_layers, model.d_model, model.num_heads, config.train.batch_size),
            (mesh.data, mesh.pipe, mesh.model),
        )


def test_numbers_and_formats_as_people_write_them():
    words = ["--config.train.num-steps=1e4", "--config.train.batch-size=1_000"]
    config = parse([*words, "--config.precision.compute=bf16"], "program").config
    assert (config.train.num_steps, config.train.batch_size) == (10_000, 1000)
    assert config.precision.compute == "bfloat16"


@pytest.mark.parametrize("words", ["--config.mesh=auto", "--config.mesh auto"])
def test_the_mesh_may_be_searched_for(words: str):
    assert parse(words.split(), "program").config.mesh.auto


def test_a_folder_does_not_hide_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where somebody works in runs/."""
    a_run(tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    shipped = load_config(CONFIGS / "quickstart.py")
    for args in ([], ["--config=quickstart"], ["--workdir=new"]):
        assert parse(args, "program").config == shipped
    assert parse(["--config=./quickstart"], "program").config.model.d_model == 32


def test_shipped_configs_are_known_by_name():
    flags = parse(["--config=gpt3_1b"], "program")
    assert flags.config == load_config(CONFIGS / "gpt3_1b.py")
    assert flags.workdir == Path("runs/gpt3_1b")


def a_run(workdir: Path, **model: Any) -> Config:
    """The settings of a run in the folder, which differ from the quick start's."""
    model = {"num_layers": 2, "d_model": 32, "num_heads": 2} | model
    config = Config(ModelConfig(**model), MeshConfig(pipe=2), data=DataConfig("book.txt"))
    workdir.mkdir()
    write_config(resolved(config), workdir)
    return config


def test_a_workdir_alone_means_its_run(tmp_path: Path):
    config, workdir = a_run(tmp_path / "run"), tmp_path / "run"
    same = (
        [f"--workdir={workdir}"],
        ["--workdir", str(workdir)],
        [f"--config={workdir}/config.json"],
        [f"--config={workdir}"],
    )
    for args in same:
        flags = parse(args, "program")
        assert (flags.config, flags.workdir) == (config, workdir), args
    flags = parse([f"--workdir={workdir}", "--config.train.seed=7"], "program")
    assert flags.config == dataclasses.replace(config, train=TrainConfig(seed=7))
    # Another config, and another folder, are as they are named.
    assert (
        parse([f"--workdir={workdir}", "--config=gpt3_1b"], "program").config.model.d_model == 2048
    )
    other = parse([f"--config={workdir}/config.json", "--workdir=other"], "program")
    assert (other.config, other.workdir) == (config, Path("other"))
    assert parse(["--workdir=new"], "program").config == parse([], "program").config


def test_what_follows_from_a_setting_still_follows_it_in_a_run(tmp_path: Path):
    a_run(tmp_path / "run")
    words = ["--config.model.d-model=64", "--config.mesh.data=2"]
    config = resolved(parse([f"--workdir={tmp_path / 'run'}", *words], "program").config)
    assert (config.model.d_ff, config.optim.shard_state) == (256, True)
    a_run(tmp_path / "own", d_ff=100)
    config = parse([f"--workdir={tmp_path / 'own'}", *words], "program").config
    assert config.model.d_ff == 100


def test_a_block_of_a_run_is_code_and_has_to_be_named(tmp_path: Path):
    path = tmp_path / "block.py"
    path.write_text("raise SystemError('the code has run')")
    a_run(tmp_path / "run", block=f"{path}:Block")
    with pytest.raises(UserError, match=r"is code and is only loaded if you name it: .* add --con"):
        parse([f"--workdir={tmp_path / 'run'}"], "program")
    named = f"--config.model.block={path}:Block"
    assert (
        parse([f"--workdir={tmp_path / 'run'}", named], "program").config.model.block == named[21:]
    )
