"""Variables that change what a process computes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tpipe_jax.config.flags import Flags, ProcessFlags
from tpipe_jax.config.settings import Config
from tpipe_jax.errors import UserError
from tpipe_jax.runtime import processes
from tpipe_jax.runtime.environment import computing, xla_flags


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not set"),
        ("--xla_b=1 --xla_a", "--xla_a=true --xla_b=1"),
        ("--xla_a=1  --xla_a=2", "--xla_a=2"),  # the last counts
        ("--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=4", "not set"),
        ('--xla_a="x y"', "--xla_a=x y"),
        ('--xla_a="x', '--xla_a="x'),
    ],
)
def test_flags_are_compared_by_what_they_do(text: str, expected: str):
    assert xla_flags(text) == expected


def test_flags_in_a_file_are_those_of_the_file(tmp_path: Path):
    path = tmp_path / "flags"
    path.write_text("--xla_b=2\n--xla_a=1\n")
    assert xla_flags(str(path)) == "--xla_a=1 --xla_b=2"
    assert xla_flags(str(tmp_path / "none")) == f"{tmp_path / 'none'}=true"


def test_variables_that_are_not_set_are_alike():
    assert computing({}) == computing({"NVIDIA_TF32_OVERRIDE": "", "HOME": "/x"})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("XLA_FLAGS", "--xla_x=1", "--xla_x=1"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest", "highest"),
        ("NVIDIA_TF32_OVERRIDE", "0", "0"),
    ],
)
def test_processes_with_other_variables_are_refused(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
):
    values: dict[str, str] = {}
    client = SimpleNamespace(
        key_value_set=values.__setitem__,
        blocking_key_value_get=lambda key, timeout: values[key],
    )
    state = SimpleNamespace(process_id=0, num_processes=2, client=client)
    monkeypatch.setattr(processes.distributed, "global_state", state)
    flags = Flags(Config(), Path("w"), ProcessFlags())
    for each in ("XLA_FLAGS", name):
        monkeypatch.delenv(each, raising=False)
    processes._agree(flags)
    assert json.loads(values["tpipe_jax/facts"])[name] == "not set"
    state.process_id = 1
    processes._agree(flags)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        processes._agree(flags)
    assert str(error.value).startswith("process 1 on ")
    assert f"({name} is {told} there and not set in process 0)" in str(error.value)
