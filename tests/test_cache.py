"""The latent cache: rows in order across growth, exact rollback, and no memory but the rows'."""

import mlx.core as mx
import pytest

from mlx_dsv3.model.cache import GROWTH, LatentCache


def numbered(start: int, length: int, width: int = 48) -> mx.array:
    """Return rows (1, length, width) that bear their numbers."""
    numbers = mx.arange(start, start + length, dtype=mx.float32)[None, :, None]
    return mx.broadcast_to(numbers, (1, length, width))


def contents(cache: LatentCache) -> list[float]:
    return cache.latents[0, :, 0].tolist()


@pytest.mark.parametrize("first", [1, GROWTH - 1, GROWTH, GROWTH + 1])
def test_rows_stay_in_order_across_growth(first):
    """A copy of the old rows that is one short, or one long, at a growth step."""
    cache = LatentCache()
    assert cache.length == cache.nbytes == 0 and cache.state == []
    for start, length in (0, first), (first, 2), (first + 2, GROWTH + 44):
        rows = cache.append(numbered(start, length))
        assert cache.length == start + length
        assert rows.shape == (1, cache.length, 48)
        assert rows[0, :, 0].tolist() == contents(cache) == list(range(cache.length))
    assert cache.nbytes == -(-cache.length // GROWTH) * GROWTH * 48 * 4


def test_trim_is_exact():
    """Rollback of rejected drafts, also across a growth step: later rows overwrite."""
    cache = LatentCache()
    cache.append(numbered(0, GROWTH - 1))
    cache.append(numbered(900, 4))
    cache.trim(4)
    cache.append(numbered(GROWTH - 1, 2))
    assert contents(cache) == list(range(GROWTH + 1))
    cache.trim(GROWTH + 1)
    assert cache.length == 0
    cache.append(numbered(7, 1))
    assert contents(cache) == [7]
    with pytest.raises(AssertionError, match="2 rows of 1"):
        cache.trim(2)


def test_earlier_rows_keep_their_values():
    """What `append` returned is a value: a later append or trim must not change it."""
    cache = LatentCache()
    early = cache.append(numbered(0, 3))
    cache.trim(2)
    late = cache.append(numbered(50, 2))
    mx.eval(early, late)
    assert early[0, :, 0].tolist() == [0, 1, 2] and late[0, :, 0].tolist() == [0, 50, 51]
