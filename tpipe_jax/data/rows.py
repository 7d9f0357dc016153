"""How a row of a batch holds a sequence, its targets and its documents. No jax."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tpipe_jax.config.settings import IGNORE, Config


@dataclass(frozen=True)
class RowLayout:
    """The layout of rows for sequences of T tokens, int32, numpy or jax arrays alike.

    A row is `[T + 1]`: inputs are all tokens but the last, targets all but the first. Where the
    settings mark documents, it is `[3, T]`: inputs, targets, and the position in the sequence at
    which the document of each input begins. A target that does not count, such as padding, is
    `IGNORE`.
    """

    seq_len: int
    marks_documents: bool

    @classmethod
    def of(cls, config: Config) -> "RowLayout":
        return cls(config.model.seq_len, config.data.marks_documents)

    def shape(self, num_rows: int) -> tuple[int, ...]:
        """Returns the shape of `num_rows` rows."""
        return (num_rows, 3, self.seq_len) if self.marks_documents else (num_rows, self.seq_len + 1)

    def inputs(self, rows: Any) -> Any:
        """Input tokens, `[B, T]`."""
        return rows[:, 0] if self.marks_documents else rows[:, :-1]

    def targets(self, rows: Any) -> Any:
        """Target tokens, `[B, T]`."""
        return rows[:, 1] if self.marks_documents else rows[:, 1:]

    def document_starts(self, rows: Any) -> Any | None:
        """Where the document of each input begins, `[B, T]`; None if the rows do not say."""
        return rows[:, 2] if self.marks_documents else None

    def counts(self, rows: Any) -> Any:
        """Which targets count, bool `[B, T]`."""
        return self.targets(rows) != IGNORE

    def of_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Returns rows made of tokens `[B, T + 1]`. Each row is a single document, learnt as a
        whole.
        """
        if not self.marks_documents:
            return tokens
        return np.stack([tokens[:, :-1], tokens[:, 1:], np.zeros_like(tokens[:, 1:])], 1)
