"""What settings say of each other."""

from dataclasses import replace

import pytest

from tpipe_jax.config.settings import Config, ModelConfig, OptimConfig, TrainConfig, differences
from tpipe_jax.errors import UserError


def test_differences_name_what_differs():
    ours = {"config": {"a": {"x": 1, "y": None}, "b": {"z": 2}}, "jax": "1"}
    theirs = {"config": {"a": {"x": 3, "y": None}, "b": {"z": 2}}, "jax": "2", "new": "4"}
    assert list(differences(ours, ours)) == []
    assert list(differences(ours, theirs, name="")) == [
        ("config.a.x", 1, 3),
        ("jax", "1", "2"),
        ("new", None, "4"),
    ]
    assert list(differences({"a": 0}, {"b": {"c": 1}})) == [
        ("config.b", None, {"c": 1}),
        ("config.a", 0, None),
    ]
    assert list(differences(ours["config"], theirs["config"])) == [("config.a.x", 1, 3)]


def test_a_whole_number_that_is_no_float_is_refused():
    for value in (10**4000, -(10**4000)):
        with pytest.raises(UserError, match=r"learning_rate=-?10*\.\.\. must be a finite number"):
            Config(optim=OptimConfig(learning_rate=value))


def test_the_table_of_local_positions_is_bounded():
    model = ModelConfig(d_model=128, seq_len=2**21)
    Config(model=model, train=TrainConfig(init="local"))
    model = replace(model, seq_len=2**22)
    Config(model=model)
    with pytest.raises(UserError, match="init=local makes a table"):
        Config(model=model, train=TrainConfig(init="local"))
