"""A random model on both sides, and the inputs that the parity tests share."""

from dataclasses import dataclass

import mlx.core as mx
import tiny
import torch

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.model.mtp import MTP
from mlx_dsv3.reference import model as reference

CONFIGS = ("A", "B", "C", "D")
BIAS_MEANS = (2.0, 0.0, -1.0)


@dataclass
class Pair:
    """One random model twice: MLX, freshly loaded, and the reference, shared and never changed."""

    model: Model
    mtp: MTP | None
    args: ModelArgs
    reference: reference.Model
    tensors: dict[str, torch.Tensor]  # hub names, float32
    config: dict


def load_reference(config: dict, tensors: dict, dtype=torch.float32) -> reference.Model:
    """Return the reference with these hub tensors in `dtype`, selection bias float32 at least."""
    model = reference.Model(reference.Args.from_dict(config)).requires_grad_(False)
    model.load_state_dict(tensors)
    model = model.to(dtype)
    for name, tensor in tensors.items():
        if dtype == torch.bfloat16 and name.endswith("e_score_correction_bias"):
            model.get_parameter(name).data = tensor.clone()
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tiny.A["vocab_size"], (batch, length), generator=generator)


def random_states(config: dict, length: int = 23, seed: int = 2) -> torch.Tensor:
    """Return normal states (1, length, hidden), as a layer meets them after its norm."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, length, config["hidden_size"], generator=generator)


def mlx_logits(model: Model, ids: torch.Tensor, chunks: tuple[int, ...] = ()) -> mx.array:
    """Return logits of all positions: without a cache, or chunk by chunk through one."""
    x = mx.array(ids.numpy())
    if not chunks:
        return model(x)
    cache, outs, start = model.make_cache(), [], 0
    for length in chunks:
        outs.append(model(x[:, start : start + length], cache))
        start += length
    assert start == ids.shape[1] == cache[0].length
    return mx.concatenate(outs, axis=1)


def mlx_pairs(model: Model, ids: torch.Tensor) -> tuple[mx.array, mx.array]:
    """Return the states g_j and next tokens t_{j+1} of a sequence, as the MTP module wants them."""
    x = mx.array(ids.numpy())
    return model.hidden(x)[:, :-1], x[:, 1:]


def mlx_drafts(mtp: MTP, g: mx.array, next_ids: mx.array, chunks: tuple[int, ...]):
    """Return MTP logits and states of all pairs, chunk by chunk through its cache."""
    cache, logits, states, start = mtp.make_cache(), [], [], 0
    for length in chunks:
        pairs = slice(start, start + length)
        more, f = mtp(g[:, pairs], next_ids[:, pairs], cache)
        logits.append(more)
        states.append(f)
        start += length
    assert start == g.shape[1] == cache.length
    return mx.concatenate(logits, axis=1), mx.concatenate(states, axis=1)
