"""The latency model on times that it must find again, and latency.json."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.latencies import (
    BLOCK,
    COEFFICIENTS,
    LENGTHS,
    bare_seconds,
    profile,
    samples,
    seconds,
)
from tpipe_jax.errors import UserError
from tpipe_jax.planning.latency import Deferral, LatencyModel, LatencyTable, Memory, Sample
from tpipe_jax.planning.latency_file import load_table


@pytest.mark.parametrize(("direction", "factor"), [("forward", 1), ("backward", 2)])
def test_the_model_finds_equation_9_again(direction: str, factor: int):
    model = LatencyModel(samples(), direction, BLOCK)
    for b in (1, 2, 3, 4):
        for i in (8, 16, 24, 40, 56, 88, 120):
            for j in (0, 3, 16, 17, 100):
                expected = factor * seconds(b, i, j)
                assert model.predict(b, i, j) == pytest.approx(expected, rel=1e-9)
    assert np.abs(model.relative_errors()).max() < 1e-9


def test_no_context_has_no_context_term():
    """The original adds the term at context 0 too: a slice at the start is then a0 too slow."""
    model = LatencyModel(samples(), "forward", BLOCK)
    for i in LENGTHS:
        assert model.predict(1, i, 0) == pytest.approx(bare_seconds(1, i), rel=1e-12)


def test_between_lengths_the_time_of_a_further_token_follows_their_logarithm():
    """Where a second sequence takes 1 s more per token at 24 tokens, and 2 s at 72, it takes 1.5 s
    at 24 times the root of 3, not half-way.
    """
    ones = [Sample(1, i, 0, 5.0 + i, 5.0 + i, False) for i in (8, 24, 41, 72)]
    twos = [Sample(2, i, 0, s, s, False) for i, s in ((8, 17.0), (24, 53.0), (72, 221.0))]
    with_context = [Sample(1, 8, j, 13.0, 13.0, False) for j in (8, 16)]
    model = LatencyModel([*ones, *twos, *with_context], "forward", BLOCK)
    more = (float(model.predict(2, 41, 0)) - 46) / 41
    assert more == pytest.approx(1 + np.log(41 / 24) / np.log(3))


def test_beyond_what_was_timed():
    """But for their own keys, no shorter slice is faster than the shortest timed, and longer ones
    go on as the last did.
    """
    model, own_keys = LatencyModel(samples(), "forward", BLOCK), COEFFICIENTS[3] / 2
    assert model.predict(1, 1, 0) == pytest.approx(LENGTHS[8] + own_keys)
    longer = 14 + 8 * (14 - 5) / (120 - 56)
    assert model.predict(1, 128, 0) == pytest.approx(longer + own_keys * 128**2)


def test_a_gpu_computes_whole_tiles():
    """A slice takes as long as one that fills its last tile; several sequences share the tiles."""
    model = LatencyModel(samples(), "forward", BLOCK, tile_tokens=8)
    for b, i, filled in ((1, 17, 24), (1, 24, 24), (4, 17, 18), (2, 100, 100)):
        assert model.predict(b, i, 0) == pytest.approx(seconds(b, filled, 0))
    assert model.predict(1, 25, 0) > model.predict(1, 24, 0) == model.predict(1, 18, 0)


def test_a_context_that_is_dear_leaves_no_slice_without_time():
    """A context may cost more than the slice's own keys, as in a loop that starts many kernels.
    What these cost then does not follow from it.
    """
    fitted = [
        Sample(1, n, j, t, t, False)
        for n, j, t in [
            *((128, 0, 1e-3), (128, 3968, 7e-3), (128, 8064, 15e-3)),
            *((1024, 0, 2e-3), (1024, 3584, 12e-3), (1024, 7168, 34e-3), (8192, 0, 8e-3)),
        ]
    ]
    model = LatencyModel(fitted, "forward", 128)
    lengths = np.arange(128, 8193, 128)
    bare = model.predict(1, lengths, 0)
    assert (bare >= 0.9e-3).all()
    assert bare[[0, 7, 63]] == pytest.approx([1e-3, 2e-3, 8e-3])


def test_many_slices_at_once_are_the_same_as_one_by_one():
    model = LatencyModel(samples(), "backward", BLOCK)
    b, i, j = np.arange(1, 5)[:, None, None], np.array([8, 20])[:, None], np.array([0, 5, 50])
    grid = model.predict(b, i, j)
    assert grid.shape == (4, 2, 3)
    for x, y, z in np.ndindex(4, 2, 3):
        assert grid[x, y, z] == pytest.approx(model.predict(b[x, 0, 0], i[y, 0], j[z]))


def test_samples_kept_out_of_the_fit_tell_its_error():
    off = Sample(1, 40, 32, 1.25 * seconds(1, 40, 32), 2 * seconds(1, 40, 32), True)
    models = profile(samples=(*samples(), off)).models()
    assert models[0].relative_errors()[-1] == pytest.approx(1 / 1.25 - 1)
    assert models[1].relative_errors()[-1] == pytest.approx(0, abs=1e-9)
    assert models[0].predict(1, 40, 32) == pytest.approx(seconds(1, 40, 32))


def test_the_fit_weighs_errors_relative_to_the_time():
    """One slice that is 1000 times as long as the others must not outweigh them all."""
    noisy = [
        Sample(*s[:3], s[3] * factor, s[4], False)
        for s, factor in zip(samples(), [1.02, 0.98] * 20, strict=False)
        if s.context > 0
    ]
    bare = [s for s in samples() if s.context == 0]
    slow = Sample(1, 120, 120, 1000 * seconds(1, 120, 120), 1.0, False)
    model = LatencyModel([*bare, *noisy, slow], "forward", BLOCK)
    errors = [abs(model.predict(*s[:3]) / s[3] - 1) for s in noisy]
    assert np.median(errors) < 0.5


def test_table_has_the_time_of_every_slice_in_units():
    table = profile().table(unit_tokens=32)
    assert table.forward.shape == table.backward.shape == (4, 4, 4)
    for b, i, j in np.ndindex(4, 4, 4):
        size, length, context = b + 1, 32 * (i + 1), 32 * j
        if length + context > 128:
            assert table.forward[b, i, j] == table.backward[b, i, j] == np.inf
            continue
        model, transfer = profile().models()[0], 0.5 + 0.25 * size * length
        expected = float(model.predict(size, length, context))
        assert table.forward[b, i, j] == pytest.approx(expected + transfer)
        assert table.backward[b, i, j] == pytest.approx(2 * expected + transfer)


def test_by_cuts_is_indexed_by_stop_and_start():
    forward = np.arange(2 * 3 * 4, dtype=float).reshape(2, 3, 4)
    table = LatencyTable(8, forward, 100 + forward)
    by_cuts = table.by_cuts(5)
    for b, stop, start in np.ndindex(2, 6, 6):
        length = stop - start
        is_known = 1 <= length <= 3 and start <= 3
        expected = forward[b, length - 1, start] if is_known else np.inf
        assert by_cuts[0][b, stop, start] == expected
        assert by_cuts[1][b, stop, start] == 100 + expected


def test_file_gives_back_what_was_saved(tmp_path: Path):
    path = tmp_path / "latency.json"
    saved = profile().table(unit_tokens=32)
    saved.save(path)
    loaded = load_table(path)
    assert loaded.unit_tokens == 32
    assert loaded.profile == saved.profile
    np.testing.assert_allclose(loaded.forward, saved.forward, rtol=1e-8)
    np.testing.assert_allclose(loaded.backward, saved.backward, rtol=1e-8)
    content = json.loads(path.read_text())
    assert content["forward"][1][0][2] == pytest.approx(saved.forward[1, 0, 2], rel=1e-8)
    assert content["forward"][0][3] == [pytest.approx(saved.forward[0, 3, 0]), None, None, None]
    assert [p.name for p in tmp_path.iterdir()] == ["latency.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"transfer": ["a", "b"]},
        {"transfer": [1.0]},
        {"outside_seconds": float("nan")},
        {"outside_seconds": "x"},
        {"memory": dict.fromkeys(Memory.__annotations__, 1) | {"fixed_bytes": "1"}},
        {"seq_len": 64},
        {"batch_size": 0},
        {"samples": [list(s) for s in samples() if s.is_test]},
        {"samples": [[1, 8, 0, 0.0, 1.0, False]]},
        {"samples": [[1, 8, 0]]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_profiles_that_are_wrong_are_refused(tmp_path: Path, change: dict[str, Any]):
    path = tmp_path / "latency.json"
    profile().table(unit_tokens=32).save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"profile": content["profile"] | change}))
    with pytest.raises(UserError, match="its profile cannot be used"):
        load_table(path)


GOOD = {
    "unit_tokens": 8,
    "forward": [[[1.0, 1.5], [2.0, None]]],
    "backward": [[[2.0, 2.5], [4, None]]],
}


def load(tmp_path: Path, content: Any) -> LatencyTable:
    path = tmp_path / "latency.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_table(path)


def test_a_file_of_times_alone_is_enough(tmp_path: Path):
    table = load(tmp_path, GOOD)
    assert table.profile is None
    assert table.forward.tolist() == [[[1.0, 1.5], [2.0, np.inf]]]
    assert table.backward.tolist() == [[[2.0, 2.5], [4.0, np.inf]]]


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(content: Any) -> None:
        for key in keys:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("forward", 0, 1, 0, None), "only one of forward and backward has a time at [0][1][0]"),
        (put("backward", 0, 0, 1, -2.5), "backward[0][0][1]=-2.5 is not a time"),
        (put("forward", 0, 0, 0, float("nan")), "forward[0][0][0]=nan is not a time"),
        (put("forward", 0, 0, 0, float("inf")), "forward[0][0][0]=inf is not a time"),
        (put("forward", 0, 0, 0, 10**400), "is not a time"),
        (put("forward", 0, 0, 0, 1e300), "forward[0][0][0]=1e+300 is not a time"),
        (put("forward", 0, 0, 0, "1"), "forward[0][0][0]='1' is not a time"),
        (put("forward", 0, 0, 0, True), "forward[0][0][0]=True is not a time"),
        (put("forward", 0, 0, [1.0]), "the lists of forward differ in length"),
        (put("forward", 0, []), "the lists of forward differ in length or are empty"),
        (put("backward", [[[1.0, 2.0]]]), "forward has the shape 1 x 2 x 2 and backward 1 x 1 x 2"),
        (put("backward", [1.0, 2.0]), "backward is not a list of lists of lists"),
        (put("backward", []), "backward is not a list of lists of lists"),
        (put("unit_tokens", 0), "unit_tokens=0 is not a positive whole number"),
        (put("unit_tokens", 8.5), "unit_tokens=8.5 is not a positive whole number"),
        (put("unit_tokens", None), "unit_tokens=None is not a positive whole number"),
        (put("profile", {"samples": []}), "its profile cannot be used"),
        (put("profile", "V100"), "its profile cannot be used (TypeError('it is not an object'))"),
        (put("profile", [1, 2]), "its profile cannot be used"),
        (lambda content: content.pop("backward"), "it has no backward"),
    ],
)
def test_files_that_are_wrong_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str
):
    content = copy.deepcopy(GOOD)
    change(content)
    with pytest.raises(UserError) as error:
        load(tmp_path, content)
    assert sentence in str(error.value)
    assert str(tmp_path / "latency.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null"])
def test_files_of_something_else_are_refused(tmp_path: Path, text: str):
    with pytest.raises(UserError, match="is no latency file"):
        load(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="No such file"):
        load_table(tmp_path / "latency.json")


def test_deferral_is_kept_in_the_file(tmp_path: Path):
    """And a profile whose numbers are too large for any format is refused."""
    deferral, path = Deferral(weights=(0.5, 0.25), saved=(0.25, 0.125)), tmp_path / "latency.json"
    table = profile(deferral=deferral).table(32)
    table.save(path)
    loaded = load_table(path)
    assert loaded.profile == table.profile
    assert table.deferred is not None
    assert loaded.deferred is not None
    for own, expected in zip(loaded.deferred, table.deferred, strict=True):
        assert own == pytest.approx(expected, rel=1e-8)
    content = json.loads(path.read_text())
    assert content["backward_weights"][0][0][0] == 0.5 + 0.25 * 32
    content["profile"]["deferral"][0][0] = 10**400
    with pytest.raises(UserError, match="its profile cannot be used"):
        load(tmp_path, content)


def test_what_is_deferred_is_not_less_than_nothing():
    """Nor a backward pass faster than it hands on what it makes."""
    measured = profile(deferral=Deferral(weights=(-5.0, 0.125), saved=(1e6, 0.0)))
    deferred = measured.without_weights(np.array([50.0, 90.0]), np.array([1, 2]), np.array([8, 40]))
    assert deferred is not None
    inputs, weights = deferred
    assert inputs.tolist() == [0.5 + 0.25 * 8, 0.5 + 0.25 * 80]
    assert weights.tolist() == [0.0, 5.0]
