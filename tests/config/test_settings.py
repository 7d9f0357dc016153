"""What settings say of each other."""

from tpipe_jax.config.settings import differences


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
