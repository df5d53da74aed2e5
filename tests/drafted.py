"""Small models whose MTP module guesses right about half of the time, and what drafting is run on.

Random MTP weights are accepted hardly ever. Here the module passes the embedding of the last token
on (`eh_proj` = [I | noise]) and the main model's layers add little to it, so both choose mostly by
the last token and agree more or less often, as `damping` and `noise` say (spec 7.2.3).
"""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny
import torch
from mlx_folder import write_mlx

from mlx_dsv3.decoding.draft_control import DraftControl
from mlx_dsv3.decoding.draft_stats import DraftStats
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.decoding.state import State
from mlx_dsv3.decoding.steps import Stepper, catch_up, decode
from mlx_dsv3.load import load_model
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.model.mtp import MTP

OUTPUTS = ("o_proj.weight", "down_proj.weight")


def agreeing_tensors(config: dict, seed: int, damping: float, noise: float) -> dict:
    """Return random tensors of a model whose MTP module often agrees with it."""
    tensors = tiny.random_tensors(config, seed)
    D, mtp = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}."
    for name in tensors:
        if name.endswith(OUTPUTS):
            tensors[name] = (tensors[name] * damping).bfloat16().float()
    guess = torch.cat([torch.eye(D), noise * torch.randn(D, D) / D**0.5], dim=1)
    tensors[mtp + "eh_proj.weight"] = guess.bfloat16().float()
    tensors[mtp + "enorm.weight"] = torch.ones(D)
    tensors[mtp + "shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    return tensors


@dataclass
class Drafted:
    """A model with its MTP module, and decoding without text around it."""

    model: Model
    mtp: MTP

    def state(self) -> State:
        return State(self.model.make_cache(), self.mtp.make_cache())

    def stepper(self, state: State, sampler: Sampler | None = None) -> Stepper:
        return Stepper(self.model, self.mtp, state, sampler or Sampler())

    def feed(self, state: State, ids: list[int]) -> None:
        """Feed ids as a prompt, without sharing anything."""
        if not ids:
            return
        state.commit(ids, self.model.hidden(mx.array([ids]), state.cache))
        catch_up(self.mtp, state)

    def run(
        self, state: State, last: int, count: int, drafts: int | DraftControl, sampler=None
    ) -> Iterator[int]:
        """Yield tokens after `last`, with a fixed number of drafts or a control."""
        control = drafts if isinstance(drafts, DraftControl) else DraftControl(fixed=drafts)
        self.stats = DraftStats()
        return decode(self.stepper(state, sampler), last, count, control, self.stats)

    def tokens(
        self, prompt: list[int], count: int, drafts: int | DraftControl, sampler=None
    ) -> list[int]:
        """Return the tokens after a prompt, computed from an empty state."""
        state = self.state()
        self.feed(state, prompt[:-1])
        return list(self.run(state, prompt[-1], count, drafts, sampler))

    def growth(self, drafts: int | DraftControl, tokens: int) -> tuple[float, float]:
        """Return what a decoded token adds to MLX's memory beside the caches, and to all memory.

        In bytes; the first quarter of the tokens warms up and does not count, nor do buffers that
        MLX keeps after their use, which have a limit of their own.
        """
        state, seen = self.state(), []
        self.feed(state, list(range(3, 40)))
        for i, _ in enumerate(self.run(state, 7, tokens, drafts)):
            if i in (tokens // 4, tokens - 1):
                resident = resident_bytes() - mx.get_cache_memory()
                caches = sum(cache.nbytes for cache in [*state.cache, state.mtp_cache])
                seen.append((i, mx.get_active_memory() - caches, resident))
        (first, *before), (last, *after) = seen
        return tuple((b - a) / (last - first) for a, b in zip(before, after, strict=True))

    def assert_exact(self, state: State, bound: float = 1e-5) -> None:
        """Check that a state is what a fresh prefill of its ids gives, rows of both caches."""
        assert state.mtp_pairs + state.num_waiting == len(state.ids)
        fresh, ids = self.state(), mx.array([state.ids])
        g = self.model.hidden(ids, fresh.cache)
        for i, (layer, expected) in enumerate(zip(state.cache, fresh.cache, strict=True)):
            assert_rows(f"layer {i}", layer, expected, len(state.ids), bound)
        if pairs := max(min(state.mtp_pairs, len(state.ids) - 1), 0):
            self.mtp.states(g[:, :pairs], ids[:, 1 : pairs + 1], fresh.mtp_cache)
            # The last of len(ids) pairs is of an id that is gone; `rewind` drops it.
            assert_rows("MTP", state.mtp_cache, fresh.mtp_cache, pairs, bound)
        assert state.mtp_cache.length == state.mtp_pairs
        if state.pending:
            assert mx.abs(state.waiting() - g[:, state.mtp_pairs :]).max().item() < bound


def resident_bytes() -> int:
    """Return the memory that this process holds now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else 0


def assert_rows(name: str, cache, expected, length: int, bound: float) -> None:
    """Check the rows of a latent cache."""
    assert cache.length - length in (0, name == "MTP") and expected.length == length, name
    actual, expected = (np.array(c.latents[0, :length]) for c in (cache, expected))
    worst = np.abs(actual - expected).max(axis=-1)
    assert worst.max() < bound, f"{name}: row {worst.argmax()} of {length} is off by {worst.max()}"


def make_drafted(folder, config=tiny.A, seed=0, damping=0.2, noise=0.15, **options) -> Drafted:
    """Write an agreeing model into a folder and load it."""
    write_mlx(folder, config, agreeing_tensors(config, seed, damping, noise), **options)
    loaded = load_model(folder)
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    store.close()
    return Drafted(model, mtp)
