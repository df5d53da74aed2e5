"""The latent cache: what one attention layer keeps of every position.

One array of rows `[latent | rope key]`, shared by all heads: its first C columns are also the
values. mlx-lm's `KVCache` with values of width 0 would do the same arithmetic, but nothing ever
evaluates those values, so each token kept its row and its graph alive in every layer: 3.5 to 7
times the memory of the rows (docs/log.md).
"""

import mlx.core as mx

GROWTH = 256  # rows that the array grows by


class LatentCache:
    """Rows of one layer for one sequence, or for several of equal length."""

    def __init__(self):
        self.length = 0
        self._buffer: mx.array | None = None  # (B, capacity, C + R); `length` rows are in use

    @property
    def latents(self) -> mx.array:
        """Return the rows in use, (B, length, C + R); there must be some."""
        return self._buffer[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Return the bytes that are allocated."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def state(self) -> list[mx.array]:
        """Return the arrays to evaluate; mlx-lm's generators ask for them by this name."""
        return [] if self._buffer is None else [self._buffer]

    def append(self, latents: mx.array) -> mx.array:
        """Append rows (B, L, C + R) and return all of them, (B, length, C + R), unevaluated."""
        end = self.length + latents.shape[1]
        if self._buffer is None or end > self._buffer.shape[1]:
            B, _, width = latents.shape
            more = mx.zeros((B, -(-end // GROWTH) * GROWTH - self.length, width), latents.dtype)
            self._buffer = mx.concatenate([self.latents, more], axis=1) if self.length else more
        self._buffer[:, self.length : end] = latents
        self.length = end
        return self.latents

    def trim(self, count: int) -> None:
        """Forget the last `count` rows."""
        assert 0 <= count <= self.length, f"{count} rows of {self.length}"
        self.length -= count
