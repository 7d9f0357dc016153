"""Documents as sequences: what of them a row has, and what of it is learnt."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from support import reference, runs
from support.token_files import TOKENS, megatron
from tpipe_jax import load
from tpipe_jax.commands.evaluate import evaluate
from tpipe_jax.commands.trained_model import Trained
from tpipe_jax.config.settings import (
    IGNORE,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from tpipe_jax.data.batches import make_sequences, open_data, open_held_out, with_packing
from tpipe_jax.data.packing import best_fit
from tpipe_jax.data.sources import Share, open_source
from tpipe_jax.devices.mesh import make_mesh, shardings
from tpipe_jax.errors import UserError
from tpipe_jax.model import reference as plain_model
from tpipe_jax.model import transformer
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.pipeline.spec import make_spec

T = 12

PAIRS = [("2+2=", "4"), ("", "word"), ("1+10=", "11!"), ("7*8=", "5")]
TEXTS = ["one", "another two", "x", "the third one of them, which is long"]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs(path: Path) -> Path:
    return jsonl(path, [{"prompt": p, "completion": c} for p, c in PAIRS])


def texts(path: Path) -> Path:
    return jsonl(path, [{"text": text} for text in TEXTS])


def config_of(path: Path, vocab_size: int = 256, **data: Any) -> Config:
    return Config(
        model=ModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=vocab_size, seq_len=T),
        train=TrainConfig(batch_size=2),
        data=DataConfig(train=str(path), **data),
    )


def rows_of(config: Config) -> np.ndarray:
    """All rows of the data of a config, in its order."""
    source = open_source("data", config.data.train, config.model.vocab_size, config.data)
    share = Share(source, range(len(source)))
    sequences = make_sequences(with_packing(config, [share]), share)
    return np.stack([sequences[i] for i in range(len(sequences))])


@given(
    st.lists(st.integers(2, 9), max_size=30),
    st.integers(9, 12),
)
def test_a_piece_goes_where_it_leaves_least_room(lengths: list[int], size: int):
    bounds = np.cumsum([0, *lengths]).tolist()
    pieces = list(itertools.pairwise(bounds))
    expected: list[list[tuple[int, int]]] = []
    room: list[int] = []
    for piece, length in zip(pieces, lengths, strict=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if not fitting:
            expected.append([])
            room.append(size)
            fitting = [len(room) - 1]
        best = min(fitting, key=lambda i: room[i])
        expected[best].append(piece)
        room[best] -= length
    assert best_fit(pieces, size) == expected


def test_prompts_are_not_learnt_and_documents_stay_whole(tmp_path: Path):
    """`auto`, with attention across documents, so that their first tokens may be learnt too."""
    rows = rows_of(config_of(pairs(tmp_path / "a.jsonl")))
    assert rows.shape == (2, 3, T)
    first, second = rows
    assert bytes(first[0].tolist()) == b"2+2=4word\0\0\0"
    assert first[1].tolist() == [IGNORE] * 3 + list(b"4word") + [IGNORE] * 4
    assert first[2].tolist() == [0] * 5 + [5] * 4 + [9, 10, 11]
    assert bytes(second[0].tolist()) == b"1+10=11!7*8="  # and then 5
    assert second[1].tolist() == [IGNORE] * 4 + list(b"11!") + [IGNORE] * 4 + [ord("5")]


def test_documents_apart_do_not_learn_their_first_tokens(tmp_path: Path):
    config = config_of(texts(tmp_path / "a.jsonl"), cross_document_attention=False)
    tokens = "".join(TEXTS).encode()
    starts = np.cumsum([0, *map(len, TEXTS)])[:-1]
    rows = rows_of(config)
    assert len(rows) == (len(tokens) - 1) // T
    for n, row in enumerate(rows):
        own = range(n * T, n * T + T)
        assert bytes(row[0].tolist()) == tokens[n * T : n * T + T]
        assert row[1].tolist() == [IGNORE if i + 1 in starts else tokens[i + 1] for i in own]
        begins = [max(s for s in starts if s <= i) for i in own]
        assert row[2].tolist() == [max(s - n * T, 0) for s in begins]


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_long_document_is_cut_where_others_stay_whole(tmp_path: Path, is_apart: bool):
    """Each token is a target once, but the first of a row, also where the rest of a document
    follows on another one.
    """
    own = ["one", "another two", "x", "28 characters, in 13, 13, 4."]
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in own])
    rows = rows_of(config_of(path, packing="whole", cross_document_attention=not is_apart))
    assert bytes(rows[0][0].tolist()) == b"one, 4.\0\0\0\0\0"
    targets = rows[:, 1][rows[:, 1] != IGNORE]
    assert sorted(targets.tolist()) == sorted("".join(text[1:] for text in own).encode())


SEPARATED = np.array([5, 6, 1, 7, 1, 1, 8, 9, 9, 9, 9, 9, 1, 4, 4], np.uint16)


def test_separators_tell_where_documents_begin(tmp_path: Path):
    SEPARATED.tofile(tmp_path / "a.bin")
    config = config_of(tmp_path / "a.bin", 10, cross_document_attention=False, separator=1)
    [row] = rows_of(config)
    assert row[2].tolist() == [0, 0, 0, 3, 3, 5, 6, 6, 6, 6, 6, 6]
    assert row[1].tolist() == [6, 1, -1, 1, -1, -1, 9, 9, 9, 9, 9, 1]


def test_in_llm_c_s_files_documents_begin_with_it(tmp_path: Path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(SEPARATED)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + SEPARATED.tobytes())
    config = config_of(tmp_path / "a.bin", 10, cross_document_attention=False, separator=1)
    [row] = rows_of(config)
    assert row[2].tolist() == [0, 0, 2, 2, 4, 5, 5, 5, 5, 5, 5, 5]


def test_shards_know_their_documents(tmp_path: Path):
    """An index of Megatron-LM, of which a document may be several sequences."""

    path = megatron(tmp_path / "a.bin", "<u2", 8, (300, 1, 699))
    config = config_of(path, 700)
    source = open_source("data", str(path), 700, config.data)
    assert source.document_starts.tolist() == [0, 300, 301]
    begins = source.begins(299, source.read(299, 304))
    assert begins.tolist() == [False, True, True, False, False]
    index = bytearray(path.with_suffix(".idx").read_bytes())
    index[-4 * 8 :] = np.array([0, 2, 3, 3], "<i8").tobytes()  # the first two are one document
    path.with_suffix(".idx").write_bytes(bytes(index))
    assert open_source("data", str(path), 700, config.data).document_starts.tolist() == [0, 301]
    assert len(TOKENS) == len(source)


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"n": [0, 1, 2, 3], "text": TEXTS}), path)
    return path


def write_array_record(path: Path) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", texts),
        ("a.parquet", write_parquet),
        ("a.array_record", write_array_record),
    ],
)
def test_records_are_documents(tmp_path: Path, name: str, write: Any):
    path = write(tmp_path / name)
    source = open_source("data", str(path), 256, DataConfig())
    assert bytes(source.read(0, len(source)).tolist()) == "".join(TEXTS).encode()
    assert source.document_starts.tolist() == np.cumsum([0, *map(len, TEXTS)])[:-1].tolist()
    assert not source.has_prompts
    # In a folder with text, each file by its kind.
    (tmp_path / "b.txt").write_text("more")
    whole = open_source("data", str(tmp_path), 256, DataConfig())
    assert bytes(whole.read(len(source) - 1, len(whole)).tolist()) == b"gmore"
    assert whole.document_starts.tolist() == [*source.document_starts, len(source)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(pipe=2)], ids=str)
@pytest.mark.parametrize("is_apart", [False, True])
def test_evaluation_is_that_of_each_completion_alone(
    tmp_path: Path, is_apart: bool, mesh_config: MeshConfig
):
    """Documents apart are as if each were run by itself; and bits are of learnt bytes."""
    data = {"packing": "whole", "cross_document_attention": not is_apart}
    path = pairs(tmp_path / "a.jsonl")
    config = runs.changed(config_of(path, **data), mesh=vars(mesh_config))
    params = transformer.init(config.model, jax.random.key(1))
    params["embed"] = jax.tree.map(lambda a: 20 * a, params["embed"])
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    staged = reference.to_stages(params, mesh)
    places = shardings(mesh, param_specs(config.model, len(staged["blocks"])))
    source = open_source("data", str(path), 256, config.data)
    share = Share(source, range(len(source)))
    config = with_packing(config, [share])
    trained = Trained(make_spec(config, mesh), jax.device_put(staged, places), 0)
    got = evaluate(trained, [share])

    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        tokens = np.frombuffer((prompt + completion).encode(), np.uint8).astype(np.int32)
        logits = plain_model.logits(config.model, params, jnp.array(tokens)[None])[0]
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        for i in range(max(len(prompt), 1), len(tokens)):
            total -= log_probs[i - 1, tokens[i]]
            count += 1
    if is_apart:
        assert (got.num_tokens, got.num_bytes) == (count, count)
        assert got.loss == pytest.approx(total / count, rel=1e-5)
        assert got.bits_per_byte == pytest.approx(got.loss / math.log(2))
    else:  # the word without a prompt follows on another document
        rows = [np.frombuffer(b"2+2=4word", np.uint8), np.frombuffer(b"1+10=11!7*8=5", np.uint8)]
        learnt = [range(4, 9), [5, 6, 7, 12]]
        total = 0.0
        for tokens, own in zip(rows, learnt, strict=True):
            logits = plain_model.logits(
                config.model, params, jnp.array(tokens.astype(np.int32))[None]
            )[0]
            log_probs = np.asarray(jax.nn.log_softmax(logits))
            total -= sum(log_probs[i - 1, tokens[i]] for i in own)
        assert got.num_tokens == count + 1 == 9
        assert got.loss == pytest.approx(total / 9, rel=1e-5)


@pytest.mark.slow
def test_a_run_learns_completions(tmp_path: Path):
    """With documents apart, in slices that end within them."""
    numbers = itertools.product(range(9), repeat=2)
    records = [{"prompt": f"{a}+{b}=", "completion": f"{a + b};"} for a, b in numbers]
    path = jsonl(tmp_path / "sums.jsonl", records)
    # Two batches of four rows, which have targets each in another number.
    pieces = [("9+9=" + "1" * n, "8;" + "2" * (11 - n)) for n in range(8)]
    others = [{"prompt": p, "completion": c} for p, c in pieces]
    data = {"train": str(path), "eval": str(jsonl(tmp_path / "eval.jsonl", others))}
    config = runs.changed(
        runs.small_config(tmp_path),
        data=data | {"cross_document_attention": False},
        train={"num_steps": 30, "eval_every": 30},
        optim={"learning_rate": 1e-2, "warmup_steps": 3},
    )
    runs.run(config, tmp_path / "run")
    lines = runs.metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    trained = load(tmp_path / "run").trained
    config, shares = open_held_out(trained.config)
    evaluation = evaluate(trained.with_config(config), shares)
    assert evaluation.num_tokens == sum(len(c) for _, c in pieces)
    assert lines[-1]["eval_loss"] == pytest.approx(evaluation.loss, rel=1e-5)


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


TWENTY = {"prompt": "a" * 10, "completion": "b" * 10}


@pytest.mark.slow
def test_slices_are_planned_for_documents(tmp_path: Path):
    """By a profile of the program that has them."""
    path = pairs(tmp_path / "a.jsonl")
    jsonl(path, [{"prompt": p, "completion": c} for p, c in PAIRS] * 8)
    config = runs.changed(
        runs.small_config(tmp_path),
        data={"train": str(path), "cross_document_attention": False},
        plan={"token_slices": "auto", "batch_slices": "auto"},
        train={"num_steps": 2},
    )
    said = runs.run(config, tmp_path / "run")
    assert said[-1].startswith("Trained 2 steps")


def test_nothing_held_out(tmp_path: Path):
    with pytest.raises(UserError, match=r"0 of them held out by config\.data\.held_out=0"):
        open_data(config_of(written(tmp_path / "a.txt", "text " * 99), held_out=0.0))
    whole = config_of(written(tmp_path / "a.txt", "text " * 99), packing="whole")
    with pytest.raises(UserError, match=r"in which no document .* begins: raise config"):
        open_data(whole)


REFUSED = {
    "cut prompts": (pairs, {"packing": "cut"}, "packing=cut would part the prompts"),
    "long pair": (
        lambda p: jsonl(p, [TWENTY]),
        {},
        "a prompt and completion of 20 tokens, more than config.model.seq_len=12",
    ),
    "no separator": (
        lambda p: written(p.with_suffix(".bin"), "some tokens of uint16 "),
        {"cross_document_attention": False},
        "does not say where documents begin: set config.data.separator",
    ),
    "no index": (
        lambda p: written(p.with_suffix(".bin"), "some tokens of uint16 "),
        {"packing": "whole", "separator": 0},
        "has no index of its documents",
    ),
    "empty document": (
        lambda p: jsonl(p, [{"text": ""}]),
        {},
        "is empty (skipped 1 empty document)",
    ),
    "no text": (lambda p: jsonl(p, [{"body": "a"}]), {}, "has no text"),
    "no object": (lambda p: jsonl(p, ["a"]), {}, "has no text"),
    "no documents": (lambda p: written(p, "\n\n"), {}, "is empty: give text"),
    "no Parquet": (lambda p: written(p.with_suffix(".parquet"), "a"), {}, "holds text, though"),
    "no ArrayRecord": (
        lambda p: written(p.with_suffix(".array_record"), "a"),
        {},
        "holds text, though its name ends in .array_record",
    ),
}


@pytest.mark.parametrize(("write", "data", "sentence"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_answered(tmp_path: Path, write: Any, data: dict[str, Any], sentence: str):
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(UserError) as error:
        open_data(config_of(path, **data))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from tpipe_jax.config import DataConfig\n"
        "from tpipe_jax.data.sources import open_source\n"
        f"open_source('data', {str(path)!r}, 256, DataConfig())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT)
    remedy = "needs pyarrow to be read: install it with pip install tpipe_jax[parquet]."
    assert done.stderr.splitlines()[-1].endswith(remedy)
