"""What a conversation has computed: latent caches and the ids they stand for, always in step.

The main cache holds one row for each id it was fed. The MTP cache holds one *pair* (state of the
main model, next id) for each position but the last few, whose states wait in `pending` until
their next id is known or a draft is wanted (spec 4.2):

    mtp_pairs + pending rows == len(ids) == main cache length
"""

from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from mlx_dsv3.errors import UserError


@dataclass
class State:
    """Caches and ids of one sequence. `mtp_cache` is None where drafts are never wanted."""

    cache: list[KVCache]
    mtp_cache: KVCache | None = None
    ids: list[int] = field(default_factory=list)
    mtp_pairs: int = 0
    pending: list[mx.array] = field(default_factory=list)

    @property
    def pending_rows(self) -> int:
        return sum(g.shape[1] for g in self.pending)

    def commit(self, ids: list[int], g: mx.array) -> None:
        """Record ids that the main model was fed and their states g (1, n, D)."""
        if self.mtp_cache is not None:
            self.pending.append(g)
        self.ids.extend(ids)

    def take_pending(self) -> mx.array:
        """Return the waiting states as one array (1, n, D); they count as pairs from now on."""
        g = self.pending[0] if len(self.pending) == 1 else mx.concatenate(self.pending, axis=1)
        self.pending = []
        self.mtp_pairs += g.shape[1]
        return g

    def give_back(self, g: mx.array) -> None:
        """Let the last states taken wait again."""
        self.pending.append(g)
        self.mtp_pairs -= g.shape[1]

    def align(self) -> None:
        """Bring the caches back to what was committed, after a step that did not end."""
        if self.mtp_cache is not None:
            self.mtp_pairs = min(self.mtp_pairs, self.mtp_cache.offset)
            known = self.mtp_pairs + self.pending_rows
            if known > len(self.ids):
                self._keep_pending(len(self.ids) - self.mtp_pairs)
            del self.ids[known:]
            self.mtp_cache.trim(self.mtp_cache.offset - self.mtp_pairs)
        for layer in self.cache:
            layer.trim(layer.offset - len(self.ids))

    def rewind(self, length: int) -> None:
        """Keep the first `length` ids for a new continuation, or one fewer.

        The pair of the last kept position holds the id that followed it before. Unless its state
        still waits in `pending`, that position goes too: feeding its id again restores the state.
        """
        if length >= len(self.ids):
            return
        if self.mtp_cache is not None and length <= self.mtp_pairs:
            length = max(length - 1, 0)
            self.mtp_pairs, self.pending = min(self.mtp_pairs, length), []
        elif self.mtp_cache is not None:
            self._keep_pending(length - self.mtp_pairs)
        del self.ids[length:]
        self.align()

    def _keep_pending(self, rows: int) -> None:
        g = mx.concatenate(self.pending, axis=1)[:, :rows]
        self.pending = [g] if rows > 0 else []

    def save(self, path: str) -> None:
        """Write caches, waiting states and ids to a safetensors file."""
        layers = self.cache if self.mtp_cache is None else [*self.cache, self.mtp_cache]
        g = self.take_rows()
        metadata = {"ids": " ".join(map(str, self.ids)), "mtp_pairs": str(self.mtp_pairs)}
        metadata["has_mtp"] = str(int(self.mtp_cache is not None))
        holder = KVCache()
        if g is not None:
            holder.update_and_fetch(g[:, None], g[:, None, :, :0])
        save_prompt_cache(path, [*layers, holder], metadata)

    def take_rows(self) -> mx.array | None:
        """Return the waiting states as one array without marking them as pairs."""
        return mx.concatenate(self.pending, axis=1) if self.pending else None


def load_state(path: str, num_layers: int) -> State:
    """Read what `State.save` wrote; raise `UserError` when it is of another model."""
    try:
        layers, metadata = load_prompt_cache(path, return_metadata=True)
        ids = [int(word) for word in metadata["ids"].split()]
        has_mtp, mtp_pairs = metadata["has_mtp"] == "1", int(metadata["mtp_pairs"])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"`{path}` holds no saved conversation: {error}") from None
    *layers, holder = layers
    if len(layers) != num_layers + has_mtp:
        raise UserError(
            f"`{path}` was saved with {len(layers) - has_mtp} layers; the model has {num_layers}"
        )
    mtp_cache = layers.pop() if has_mtp else None
    pending = [] if holder.empty() else [holder.state[0][:, 0]]
    return State(layers, mtp_cache, ids, mtp_pairs, pending)
