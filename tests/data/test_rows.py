"""What lies where in a row."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from tpipe_jax.config.settings import IGNORE, Config, DataConfig, ModelConfig
from tpipe_jax.data.batches import make_row
from tpipe_jax.data.rows import RowLayout

T = 6


def config(**data: Any) -> Config:
    return Config(ModelConfig(seq_len=T), data=DataConfig(**data))


def source() -> Any:
    """Tokens 10, 11, 12 ..., in documents that begin at 0 and 4, all of them learnt."""
    return SimpleNamespace(
        read=lambda start, stop: np.arange(10 + start, 10 + stop, dtype=np.int32),
        is_learnt=lambda start, stop: np.ones(stop - start, bool),
        begins=lambda start, tokens: np.isin(np.arange(start, start + len(tokens)), (0, 4)),
    )


def test_inputs_are_all_tokens_but_the_last_and_targets_all_but_the_first():
    own = config()
    layout, row = RowLayout.of(own), make_row(own, source(), [(0, 5)])[None]
    assert row.shape == layout.shape(1)
    assert layout.inputs(row).tolist() == [[10, 11, 12, 13, 14, IGNORE]]
    assert layout.targets(row).tolist() == [[11, 12, 13, 14, IGNORE, IGNORE]]
    assert layout.counts(row).sum() == 4
    assert layout.document_starts(row) is None


def test_rows_that_mark_documents_say_where_each_begins():
    own = config(cross_document_attention=False)
    layout, row = RowLayout.of(own), make_row(own, source(), [(0, 7)])[None]
    assert row.shape == layout.shape(1) == (1, 3, T)
    assert layout.inputs(row).tolist() == [[10, 11, 12, 13, 14, 15]]
    assert layout.targets(row).tolist() == [[11, 12, 13, IGNORE, 15, 16]]
    assert layout.document_starts(row).tolist() == [[0, 0, 0, 0, 4, 4]]
    assert layout.counts(row).tolist() == [[True, True, True, False, True, True]]


def test_tokens_alone_are_rows_of_one_document():
    tokens = np.arange(14).reshape(2, T + 1)
    for own in (config(), config(cross_document_attention=False)):
        layout = RowLayout.of(own)
        rows = layout.of_tokens(tokens)
        assert rows.shape == layout.shape(2)
        np.testing.assert_array_equal(layout.inputs(rows), tokens[:, :-1])
        np.testing.assert_array_equal(layout.targets(rows), tokens[:, 1:])
        starts = layout.document_starts(rows)
        assert starts is None or not starts.any()
