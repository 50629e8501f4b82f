"""What one request to POST /observe brings: embeddings made elsewhere, and what may come with them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service.engine.queue import Rows


@dataclass(frozen=True, eq=False)
class Observation:
    """What one request brings: rows (n, d), a key a row, inputs (n, k), and embeddings of the canary images (m, d)."""

    rows: Rows | None
    keys: Sequence[bytes] | NDArray[np.generic] | None = None
    inputs: Rows | None = None
    canary: Rows | None = None

    @property
    def dimension(self) -> int:
        """Width of the rows, or of the canary's."""
        rows = self.canary if self.rows is None else self.rows
        assert rows is not None
        return int(rows.shape[1])

    def some(self, count: int) -> "Observation":
        """So many of the rows, at random, with their keys and inputs; the canary stays."""
        assert self.rows is not None
        chosen = np.sort(np.random.default_rng().choice(len(self.rows), count, replace=False))
        keys = self.keys
        if keys is not None:
            keys = keys[chosen] if isinstance(keys, np.ndarray) else [keys[index] for index in chosen]
        inputs = None if self.inputs is None else self.inputs[chosen]
        return replace(self, rows=self.rows[chosen], keys=keys, inputs=inputs)
