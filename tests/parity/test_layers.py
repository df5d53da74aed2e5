"""One layer at a time, the same input on both sides: says which module is wrong."""

import mlx.core as mx
import pytest
import tiny
from compare import LAYER, assert_close

from mlx_dsv3.model.cache import LatentCache
from parity.pairs import BIAS_MEANS, CONFIGS, random_states

pytestmark = pytest.mark.usefixtures("both_ways")


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_layer(random_pair, name):
    """Attention alone, through the cache in chunks of 10, 1, 2, 3 and 7."""
    pair, x = random_pair(tiny.CONFIGS[name]), random_states(tiny.CONFIGS[name])
    layer, cache, start = pair.model.layers[1].self_attn, LatentCache(), 0
    expected = pair.reference.model.layers[1].self_attn(x)
    for length in (10, 1, 2, 3, 7):
        chunk = slice(start, start + length)
        out = layer(mx.array(x[:, chunk].numpy()), cache)
        assert_close(f"{name} self_attn {start}", out, expected[:, chunk], LAYER)
        start += length


@pytest.mark.parametrize("bias_mean", BIAS_MEANS)
@pytest.mark.parametrize("name", CONFIGS)
def test_moe_layer(random_pair, name, bias_mean):
    """Router, experts and shared expert alone; 23 tokens, then 408 through the sorted path."""
    pair = random_pair(tiny.CONFIGS[name], bias_mean)
    for length in 23, 408:
        x = random_states(tiny.CONFIGS[name], length)
        for i in 1, 3:
            out = pair.model.layers[i].mlp(mx.array(x.numpy()))
            expected = pair.reference.model.layers[i].mlp(x)
            assert_close(f"{name} layer {i} mlp, {length} tokens", out, expected, LAYER)


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_and_mtp_layer(random_pair, name):
    """The leading dense layer, and the MTP block with its joined projections."""
    pair, x = random_pair(tiny.CONFIGS[name]), random_states(tiny.CONFIGS[name])
    out = pair.model.layers[0](mx.array(x.numpy()))
    assert_close(f"{name} layer 0", out, pair.reference.model.layers[0](x), LAYER)
    out = pair.mtp.mlp(mx.array(x.numpy()))
    assert_close(f"{name} MTP mlp", out, pair.reference.model.layers[4].mlp(x), LAYER)
