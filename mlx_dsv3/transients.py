"""What a prefill holds at its worst moment, beside weights and cached rows.

Arithmetic on the shapes that `model/mla.py` and `experts/products.py` make, with the blocks that
they choose; nothing is computed here.
"""

import mlx.core as mx

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.mla import ABSORBED_MAX_QUERIES, absorbed_size, blocks, expanded_sizes


def transient_bytes(args: ModelArgs, dtype: mx.Dtype, tokens: int, context: int) -> int:
    """Estimate what one layer of a prefill chunk takes beside weights and cache.

    The chunk is the last of a `context`, and a few tokens more may follow it in another form.
    """
    D, F, K = args.hidden_size, args.moe_intermediate_size, args.num_experts_per_tok
    few = min(tokens, ABSORBED_MAX_QUERIES)
    attention = max(attention_bytes(args, dtype.size, L, context) for L in (few, tokens))
    # Rows in the order of experts and of tokens; bfloat16 ones are weighed as float32. Before
    # that: the input's rows, gate and up, and their product.
    rows = max(2 * D if dtype.size == 4 else 3 * D, D + 3 * F)
    mlp = tokens * max(K * rows, 4 * args.intermediate_size) * dtype.size
    return max(attention, mlp) + 4 * tokens * D * dtype.size


def attention_bytes(args: ModelArgs, itemsize: int, L: int, S: int) -> int:
    """Return the most bytes that L queries over S positions take beside weights and cached rows.

    Counts what MLX's CPU backend was seen to hold (`test_transients.py`). Of a block's scores that
    is one copy in float32, because each step takes over the buffer of the one before it.
    """
    H, C, R = args.num_attention_heads, args.kv_lora_rank, args.qk_rope_head_dim
    N, V = args.qk_nope_head_dim, args.v_head_dim
    held = L * H * (N + R) + L * (H + 1) * R + 2 * S * (C + R)  # queries; rows, as the cache grows
    if L <= ABSORBED_MAX_QUERIES:
        score_bytes = absorbed_size(L, S, H) * H * S * (4 if itemsize == 4 else 8)
        return (held + 3 * L * H * (C + R)) * itemsize + score_bytes
    group, size = expanded_sizes(L, S, H, N + R + V, itemsize)
    expanding = group * S * (C + N + R + max(N, V))  # C: a CPU's product copies its input
    scores = max((block.stop - block.start) * seen for block, seen in blocks(L, S, size))
    attending = group * (S * (N + R + V) + scores)
    return (held + L * H * V + max(expanding, attending, 3 * L * H * V)) * itemsize
