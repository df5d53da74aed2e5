"""What a conversation has computed: latent caches and the ids they stand for, always in step.

The main cache holds one row for each id it was fed. The MTP cache holds one *pair* (state of the
main model, next id) for each position but the last ones, whose states wait in `pending` until a
draft is wanted or their number grows (spec 4.2):

    mtp_pairs + waiting states == len(ids) == main cache length

A step changes the caches first and is committed last, in statements that Ctrl-C cannot part. What
it left beyond the committed is cut off by `align`.
"""

import hashlib
import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dsv3.checkpoint.format import FLOATS
from mlx_dsv3.checkpoint.headers import read_header
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.decoder import Model

FORMAT = "mlx_dsv3 conversation 1"
NEW = "start a new conversation"


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """Return how many leading ids two lists share."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))


@dataclass
class State:
    """Caches and ids of one sequence. `mtp_cache` is None where drafts are never wanted."""

    cache: list[LatentCache]
    mtp_cache: LatentCache | None = None
    ids: list[int] = field(default_factory=list)
    mtp_pairs: int = 0
    pending: list[mx.array] = field(default_factory=list)
    owner: weakref.ref[Model] | None = None  # of what computed it, where that is known

    @property
    def num_waiting(self) -> int:
        return sum(g.shape[1] for g in self.pending)

    def waiting(self) -> mx.array:
        """Return the waiting states as one array (1, n, D)."""
        return self.pending[0] if len(self.pending) == 1 else mx.concatenate(self.pending, axis=1)

    def commit(self, ids: list[int], g: mx.array, paired: bool = False) -> None:
        """Record ids that the main model was fed and their states, the first rows of g (1, n, D).

        Later rows of g are of rejected drafts. With `paired` the states that waited are in the
        MTP cache now.
        """
        pending, pairs = [], self.mtp_pairs + (self.num_waiting if paired else 0)
        if self.mtp_cache is not None:
            pending = [*([] if paired else self.pending), g[:, : len(ids)]]
        self.ids.extend(ids)
        self.mtp_pairs, self.pending = pairs, pending

    def keep_last_waiting(self) -> None:
        """Record that all waiting states but the last are in the MTP cache."""
        g = self.waiting()
        last = mx.contiguous(g[:, -1:])  # a view would keep all of a prompt's states in memory
        self.mtp_pairs, self.pending = self.mtp_pairs + g.shape[1] - 1, [last]

    def drop_mtp(self) -> None:
        """Go on without drafts."""
        self.mtp_cache, self.mtp_pairs, self.pending = None, 0, []

    def align(self) -> None:
        """Bring the caches back to what was committed, after a step that did not end."""
        if self.mtp_cache is not None:
            del self.ids[self.mtp_pairs + self.num_waiting :]
            self.mtp_cache.trim(self.mtp_cache.length - self.mtp_pairs)
        for layer in self.cache:
            layer.trim(layer.length - len(self.ids))

    def rewind(self, length: int) -> None:
        """Keep the first `length` ids for a new continuation, or one fewer.

        The pair of the last kept position holds the id that followed it before. Unless its state
        still waits, that position goes too: feeding its id again restores the state.
        """
        if length < len(self.ids) or not self.pending:
            length = min(length, len(self.ids))
            waiting = length - self.mtp_pairs if self.pending else 0
            pending = [mx.contiguous(self.waiting()[:, :waiting])] if waiting > 0 else []
            mx.eval(pending)  # or each reply to one prompt would add to one graph
            if self.mtp_cache is not None and not pending:
                length = max(length - 1, 0)
            self.mtp_pairs, self.pending = min(self.mtp_pairs, length), pending
            del self.ids[length:]
        self.align()

    def save(self, path: str | Path, model: Model) -> None:
        """Write caches, waiting states and ids to a safetensors file, whole or not at all.

        `model` is what computed them; `load_state` refuses them for another one.
        """
        path = Path(path)
        layers = [*self.cache, *([] if self.mtp_cache is None else [self.mtp_cache])]
        arrays = {f"layers.{i}": c.latents for i, c in enumerate(layers) if c.length}
        if self.pending:
            arrays["waiting"] = self.waiting()
        metadata = {
            "format": FORMAT,
            "model": fingerprint(model),
            "has_mtp": str(int(self.mtp_cache is not None)),
            "mtp_pairs": str(self.mtp_pairs),
            "ids": " ".join(map(str, self.ids)),
        }
        partial = path.with_name(f".{path.stem}.partial.safetensors")
        partial.unlink(missing_ok=True)  # it may be a link that others put there
        try:
            mx.save_safetensors(str(partial), arrays, metadata)
            os.replace(partial, path)
        finally:  # a disk that it has filled takes nothing else
            partial.unlink(missing_ok=True)


def fingerprint(model: Model) -> str:
    """Return a digest of a model's weights, which tells models and quantisations apart.

    Of every parameter it takes name, shape, dtype and the first values; of the experts, which
    are not parameters and may be on disk, what `Bank.identity` says.
    """
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(memoryview(mx.contiguous(array.flatten()[:16]).view(mx.uint8)))
    for name, module in sorted(model.named_modules()):
        if (experts := getattr(module, "experts", None)) is not None:
            digest.update(f"{name} ".encode() + experts.bank.identity)
    return digest.hexdigest()


def load_state(path: str | Path, model: Model) -> State:
    """Read what `State.save` wrote; raise `UserError` for anything else and another model's."""
    try:  # MLX takes what a header says for lengths, and reads beyond the file
        are_floats = all(info.dtype in FLOATS for info in read_header(Path(path)).values())
    except UserError as error:
        raise UserError(error.message, NEW) from None
    arrays, metadata = {}, {}
    if are_floats:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    if metadata.get("format") != FORMAT:
        raise UserError(f"`{path}` is not a saved conversation")
    if metadata.get("model") != fingerprint(model):
        raise UserError(
            f"`{path}` was saved with another model or another quantisation of it",
            "load it with the model that it was saved with",
        )
    try:
        state = restore(arrays, metadata, model.args)
    except (KeyError, ValueError) as error:
        raise UserError(f"`{path}` is damaged: {error}", NEW) from None
    state.owner = weakref.ref(model)
    return state


def restore(arrays: dict[str, mx.array], metadata: dict[str, str], args: ModelArgs) -> State:
    """Build a state from what a file holds; raise `KeyError` or `ValueError` where it is not one.

    Ids reach the embedding, and MLX checks no index: so everything is checked here.
    """
    ids, pairs = [int(word) for word in metadata["ids"].split()], int(metadata["mtp_pairs"])
    has_mtp = metadata["has_mtp"] == "1"
    if strange := [i for i in ids if not 0 <= i < args.vocab_size]:
        raise ValueError(f"id {strange[0]} is not in the vocabulary of {args.vocab_size}")
    if not 0 <= pairs <= (len(ids) if has_mtp else 0):
        raise ValueError(f"{pairs} pairs of {len(ids)} ids")
    lengths = [len(ids)] * args.num_hidden_layers + [pairs] * has_mtp
    width, waiting = args.kv_lora_rank + args.qk_rope_head_dim, len(ids) - pairs
    shapes = {f"layers.{i}": (1, length, width) for i, length in enumerate(lengths) if length}
    if has_mtp and waiting:
        shapes["waiting"] = (1, waiting, args.hidden_size)
    for name in sorted(shapes.keys() | arrays.keys()):
        found = arrays[name].shape if name in arrays else None
        if found != shapes.get(name):
            raise ValueError(f"`{name}` has shape {found}, not {shapes.get(name)}")
        if not mx.isfinite(arrays[name]).all():
            raise ValueError(f"`{name}` holds values that are not finite")
    layers = [LatentCache() for _ in lengths]
    for i, layer in enumerate(layers):
        if lengths[i]:
            layer.append(arrays[f"layers.{i}"])
    return State(
        cache=layers[: args.num_hidden_layers],
        mtp_cache=layers[-1] if has_mtp else None,
        ids=ids,
        mtp_pairs=pairs,
        pending=[arrays["waiting"]] if "waiting" in arrays else [],
    )
