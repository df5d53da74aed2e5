"""Push prompts through a checkpoint with a part of one layer in memory at a time.

A part is a layer's attention, its dense MLP or router and shared expert, or a few routed experts;
the next part is read while the present one computes. All prompts pass a part before it is freed,
each by itself, so the numbers are those of the whole model in memory, bit for bit, as long as the
attention scores of a prompt fit SCORE_BYTES (longer prompts go in chunks of queries).

Nothing here knows about golden files.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_dsv3.reference.args import Args
from mlx_dsv3.reference.hub import HubTensors, Stored, check_tensors
from mlx_dsv3.reference.model import (
    MLP,
    DecoderLayer,
    MoE,
    RMSNorm,
    add_expert,
    make_layer,
)
from mlx_dsv3.reference.weights import Arithmetic, fill

SCORE_BYTES = 256 << 20  # float32 scores of one chunk of queries; about three copies are alive
EXPERT_BYTES = 256 << 20  # stored bytes of the experts read at once
HEAD_BYTES = 256 << 20  # stored bytes of the rows of lm_head read at once
TOP = 20


class Reader:
    """Reads the tensors of the next part in a thread of its own."""

    def __init__(self, tensors: HubTensors):
        self.tensors = tensors
        self.pool = ThreadPoolExecutor(1)
        self.pending: dict[tuple[str, ...], Future] = {}

    def want(self, names: Sequence[str]) -> None:
        """Begin to read these tensors."""
        key = tuple(names)
        if key and key not in self.pending:
            self.pending[key] = self.pool.submit(self._read, key)

    def take(self, names: Sequence[str]) -> dict[str, Stored]:
        """Return tensors by name, as soon as they are read."""
        self.want(names)
        return self.pending.pop(tuple(names)).result() if names else {}

    def _read(self, names: tuple[str, ...]) -> dict[str, Stored]:
        return {name: self.tensors.stored(name) for name in names}

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


@dataclass
class LayerStates:
    """What one layer did to each prompt: states (L, D), expert ids (L, K) and margins (L,)."""

    attention: list[Tensor]
    mlp: list[Tensor]
    experts: list[Tensor]
    margins: list[Tensor]


@dataclass
class HeadStatistics:
    """Of one prompt's logits: log-sum-exp (L,), the 20 largest (L, 20), and the target's (L,)."""

    logsumexp: Tensor
    top_ids: Tensor
    top_logits: Tensor
    target_logits: Tensor


class Stream:
    """One checkpoint, one arithmetic; layers in any order, the caller keeps the states.

    States and tokens are lists with one tensor for each prompt: states (1, L, D), ids (L,).
    """

    def __init__(self, tensors: HubTensors, arithmetic: Arithmetic):
        self.tensors, self.arithmetic = tensors, arithmetic
        self.args = Args.from_dict(tensors.config)
        check_tensors(tensors, self.args)
        self.reader = Reader(tensors)

    def close(self) -> None:
        self.reader.close()

    def embed(self, ids: list[Tensor]) -> list[Tensor]:
        """Return the embeddings of token ids; only their rows are read."""
        name = "model.embed_tokens.weight"
        rows = {i: self.tensors.rows(name, i, i + 1) for i in torch.cat(ids).unique().tolist()}
        tables = [torch.cat([rows[i] for i in each.tolist()])[None] for each in ids]
        return [table.to(self.arithmetic.device, self.arithmetic.dtype) for table in tables]

    def norm(self, states: list[Tensor]) -> list[Tensor]:
        """Return the states after the final norm, g."""
        with torch.device("meta"):
            norm = RMSNorm(self.args.hidden_size, self.args.rms_norm_eps)
        self._fill(norm, "model.norm.", ["model.norm.weight"])
        return [norm(h) for h in states]

    def part_names(self, i: int) -> tuple[list[str], list[str]]:
        """Return the tensors of layer i before its second half, and those of it but experts."""
        with torch.device("meta"):
            names = make_layer(self.args, i).state_dict()
        prefix = f"model.layers.{i}."
        late = ("mlp.", "post_attention_layernorm.", "shared_head.")
        first = [prefix + name for name in names if not name.startswith(late)]
        second = [prefix + n for n in names if n.startswith(late) and ".experts." not in n]
        return first, second

    def layer(self, i: int, states: list[Tensor]) -> LayerStates:
        """Push every prompt through layer i."""
        layer = self._first_half(i)
        return self._finish(i, layer, states)

    def mtp(self, g: list[Tensor], next_ids: list[Tensor]):
        """Return the MTP block's inputs, its LayerStates, and its states f after its own norm.

        g is (1, L, D) and next_ids (L,): pair j is (g_j, t_{j+1}).
        """
        i = self.args.num_hidden_layers
        layer = self._first_half(i)
        inputs = [layer.pairs(e, h) for e, h in zip(self.embed(next_ids), g, strict=True)]
        result = self._finish(i, layer, inputs)
        return inputs, result, [layer.shared_head.norm(h[None]) for h in result.mlp]

    def head(self, states: list[Tensor], targets: list[Tensor]) -> list[HeadStatistics]:
        """Return statistics of the logits of states (1, L, D), a block of the vocabulary at a time.

        targets (L,) are the ids whose logits are wanted, -1 for none.
        """
        name, D = "lm_head.weight", self.args.hidden_size
        rows = max(TOP, HEAD_BYTES // (2 * D))
        found: list[HeadStatistics | None] = [None] * len(states)
        for start in range(0, self.args.vocab_size, rows):
            stop = min(start + rows, self.args.vocab_size)
            weight = self.tensors.rows(name, start, stop)
            weight = weight.to(self.arithmetic.device, self.arithmetic.dtype)
            for p, (h, ids) in enumerate(zip(states, targets, strict=True)):
                logits = F.linear(h[0], weight).float()  # (L, rows)
                found[p] = merge(found[p], block_statistics(logits, ids, start))
        return found

    def _first_half(self, i: int) -> DecoderLayer:
        """Return layer i with its attention (and an MTP module's inputs) filled in."""
        with torch.device("meta"):
            layer = make_layer(self.args, i)
        first, second = self.part_names(i)
        self._fill(layer, f"model.layers.{i}.", first)
        self.reader.want(second)
        return layer

    def _finish(self, i: int, layer: DecoderLayer, states: list[Tensor]) -> LayerStates:
        states = [self._attend(layer, h) for h in states]
        layer.self_attn = None  # frees it
        _, second = self.part_names(i)
        self._fill(layer, f"model.layers.{i}.", second)
        xs = [layer.post_attention_layernorm(h) for h in states]
        following = self.part_names(i + 1)[0] if i + 1 < self.num_layers else []
        experts, margins = [], []
        if isinstance(layer.mlp, MoE):
            ys, experts, margins = self._experts(i, layer.mlp, xs, following)
        else:
            self.reader.want(following)
            ys = [layer.mlp(x) for x in xs]
        after = [h + y for h, y in zip(states, ys, strict=True)]
        return LayerStates([h[0] for h in states], [h[0] for h in after], experts, margins)

    @property
    def num_layers(self) -> int:
        return self.args.num_hidden_layers + self.args.num_nextn_predict_layers

    def _attend(self, layer: DecoderLayer, h: Tensor) -> Tensor:
        L = h.shape[1]
        step = max(1, SCORE_BYTES // (4 * self.args.num_attention_heads * L))
        if step >= L:
            return layer.attend(h)
        cache = {}
        chunks = [layer.attend(h[:, start : start + step], cache) for start in range(0, L, step)]
        return torch.cat(chunks, dim=1)

    def _experts(self, i: int, moe: MoE, xs: list[Tensor], following: list[str]):
        """Return MoE outputs, ids and margins; experts that no token chose are not read."""
        flats = [x.flatten(0, -2) for x in xs]  # (T, D)
        routed = [moe.gate(flat) for flat in flats]
        outs = [torch.zeros_like(f, dtype=r[1].dtype) for f, r in zip(flats, routed, strict=True)]
        needed = torch.cat([indices.flatten() for indices, _ in routed]).unique().tolist()
        prefix = f"model.layers.{i}.mlp.experts."
        with torch.device("meta"):
            leaves = list(MLP(1, 1).state_dict())
        nbytes = sum(self.tensors.entry(f"{prefix}{needed[0]}.{leaf}").nbytes for leaf in leaves)
        size = max(1, EXPERT_BYTES // nbytes)
        groups = [needed[start : start + size] for start in range(0, len(needed), size)]
        parts = [[f"{prefix}{idx}.{leaf}" for idx in group for leaf in leaves] for group in groups]
        for group, part, upcoming in zip(groups, parts, [*parts[1:], following], strict=True):
            values = self.reader.take(part)
            self.reader.want(upcoming)
            for idx in group:
                expert = self._expert(
                    {leaf: values.pop(f"{prefix}{idx}.{leaf}") for leaf in leaves}
                )
                for p, (flat, (indices, weights)) in enumerate(zip(flats, routed, strict=True)):
                    if (indices == idx).any():
                        outs[p] = add_expert(outs[p], expert, idx, flat, indices, weights)
        ys = [moe.with_shared(out, x) for out, x in zip(outs, xs, strict=True)]
        experts = [indices.sort(-1).values for indices, _ in routed]
        return ys, experts, [moe.gate.margins(flat) for flat in flats]

    def _expert(self, values: dict[str, Stored]) -> MLP:
        with torch.device("meta"):
            expert = MLP(self.args.hidden_size, self.args.moe_intermediate_size)
        fill(expert, values, self.arithmetic, self.tensors.block)
        return expert

    def _fill(self, module: torch.nn.Module, prefix: str, names: list[str]) -> None:
        values = self.reader.take(names)
        for name in names:  # one at a time: the stored form is freed as soon as it is used
            value = {name.removeprefix(prefix): values.pop(name)}
            fill(module, value, self.arithmetic, self.tensors.block)


def block_statistics(logits: Tensor, ids: Tensor, start: int) -> HeadStatistics:
    """Return the statistics of the logits (L, rows) of vocabulary ids from `start` on."""
    top = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    ids = ids.to(logits.device) - start
    inside = (ids >= 0) & (ids < logits.shape[-1])
    target = logits.gather(-1, ids.where(inside, 0)[:, None])[:, 0]
    target = target.masked_fill(~inside, -torch.inf)
    return HeadStatistics(logits.logsumexp(-1), top.indices + start, top.values, target)


def merge(a: HeadStatistics | None, b: HeadStatistics) -> HeadStatistics:
    """Join the statistics of two parts of the vocabulary."""
    if a is None:
        return b
    values = torch.cat([a.top_logits, b.top_logits], dim=-1)
    top = values.topk(min(TOP, values.shape[-1]), dim=-1)
    top_ids = torch.cat([a.top_ids, b.top_ids], dim=-1).gather(-1, top.indices)
    target = torch.maximum(a.target_logits, b.target_logits)
    return HeadStatistics(torch.logaddexp(a.logsumexp, b.logsumexp), top_ids, top.values, target)
