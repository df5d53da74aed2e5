"""Two MLX folders over the same text, one after the other: how far MODEL is from REFERENCE.

KL is KL(reference || model) of the next-token distribution over the whole vocabulary, in nats, at
every token that has another before it in its window. Windows are those of `perplexity.py`; they
are drawn again with replacement (`DRAWS` times, seed 0) for the 95 % intervals, because tokens of
one window are not independent. Only `kept.py` knows what stays of the reference.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dsv3.checkpoint.folder import Folder, fetch
from mlx_dsv3.errors import UserError, in_line, read_text
from mlx_dsv3.load import Loaded, load_checked_tokenizer
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.parity.kept import Kept, check_room, digest_of, is_kept, keep
from mlx_dsv3.parity.perplexity import HEAD_ROWS, MOST_NATS, ids_of, windows
from mlx_dsv3.sizes import size

LEAST_WINDOWS = 10  # fewer say little of how windows differ
DRAWS = 2000
TAIL = 0.99
Loader = Callable[[], Loaded]


@dataclass
class Comparison:
    """A number for each predicted token, window after window; `sizes` are the windows' (W,)."""

    sizes: np.ndarray
    divergences: np.ndarray
    is_same: np.ndarray
    losses: np.ndarray
    reference_losses: np.ndarray

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of each window (W,)."""
        return np.add.reduceat(values.astype(np.float64), np.cumsum(self.sizes) - self.sizes)

    def figures(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Return each figure (R,) of texts that have window w `counts[r, w]` times."""
        num = counts @ self.sizes
        kl, same, loss, reference = (
            counts @ self.sums(values) / num
            for values in (self.divergences, self.is_same, self.losses, self.reference_losses)
        )
        return {
            "kl": kl,
            "kl_p99": self.tails(counts),
            "best_token": same,
            "perplexity": np.exp(loss),
            "reference_perplexity": np.exp(reference),
            "perplexity_ratio": np.exp(loss - reference),
        }

    def tails(self, counts: np.ndarray) -> np.ndarray:
        """Return the 99th percentile of KL (R,): the least value that so many are not above."""
        order = np.argsort(self.divergences)
        window = np.repeat(np.arange(len(self.sizes)), self.sizes)[order]
        found = []
        for row in counts:
            seen = np.cumsum(row[window])
            found.append(self.divergences[order[np.searchsorted(seen, TAIL * seen[-1])]])
        return np.array(found)

    def intervals(self) -> dict[str, dict[str, float]]:
        """Return value, low and high of each figure."""
        values = self.figures(np.ones((1, len(self.sizes)), np.int64))
        drawn = self.figures(draws(len(self.sizes)))
        found = {}
        for name, value in values.items():
            low, high = np.percentile(drawn[name], (2.5, 97.5))
            found[name] = {"value": float(value[0]), "low": float(low), "high": float(high)}
        return found


def draws(num_windows: int) -> np.ndarray:
    """Return how often each window is in each of the drawn texts (R, W)."""
    share = np.full(num_windows, 1 / num_windows)
    return np.random.default_rng(0).multinomial(num_windows, share, DRAWS)


def same_windows(
    model: Folder, reference: Folder, files: list[Path], context: int, trusts: bool
) -> list[list[int]]:
    """Cut the texts, each for itself; refuse folders whose ids mean different things."""
    texts, cut = [read_text(file) for file in files], []
    for folder in (model, reference):
        tokenizer = load_checked_tokenizer(folder.path, folder.args, folder.config, trusts)
        bos = folder.config.get("bos_token_id")
        ids = [ids_of(tokenizer, text, bos) for text in texts]
        for file, found in zip(files, ids, strict=True):
            if not found:
                raise UserError(f"`{file}` has no tokens", "give a longer text")
        cut.append([window for found in ids for window in windows(found, bos, context)])
    sizes = [folder.args.vocab_size for folder in (model, reference)]
    if sizes[0] != sizes[1]:
        raise other_ids(model, reference, f"vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens")
    if cut[0] != cut[1]:
        raise other_ids(model, reference, "different tokens for this text")
    if len(cut[0]) < LEAST_WINDOWS:
        num, count = sum(map(len, cut[0])), len(cut[0])
        raise UserError(
            f"the text has {num:,} tokens, {count} window{'s' * (count > 1)} of {context:,}; an "
            f"interval takes {LEAST_WINDOWS} windows or more",
            f"`--context {num // LEAST_WINDOWS}` cuts shorter ones, or give a longer text"
            if num >= 4 * LEAST_WINDOWS
            else "give a longer text",
        )
    return cut[0]


def other_ids(model: Folder, reference: Folder, what: str) -> UserError:
    return UserError(
        f"`{model.path}` and `{reference.path}` have {what}; no log-probabilities of theirs can "
        "be compared",
        "give two conversions of one model",
    )


def compare(
    model: Folder,
    reference: Folder,
    found: list[list[int]],
    load: Loader,
    load_reference: Loader,
    dtype: mx.Dtype,
    where: Path | None = None,
) -> Comparison:
    """Compare two folders over windows of ids; `where` is the folder of kept states to stay."""
    if where is None:
        with tempfile.TemporaryDirectory(prefix="mlx-dsv3-states-") as scratch:
            return compare(
                model, reference, found, load, load_reference, dtype, Path(scratch) / "kept"
            )
    found = sorted(found, key=len, reverse=True)  # those of one length run together
    sizes = np.array([len(window) - 1 for window in found])
    reference, num = fetch(reference), int(sizes.sum())
    digest = digest_of(reference, found, dtype)
    if not is_kept(where, digest):
        nbytes = check_room(where, reference, num)
        print(in_line(f"keeping {size(nbytes)} of the reference in `{where}`"), file=sys.stderr)
        with load_reference() as loaded:
            keep(where, loaded.model, states(loaded, found), num, digest)
    kept = Kept(where, reference, num)
    with load() as loaded:
        numbers = list(differences(loaded, kept, found))
    columns = [np.concatenate(column) for column in zip(*numbers, strict=True)]
    for folder, values in ((model, columns[0]), (model, columns[2]), (reference, columns[3])):
        check_numbers(folder, values)
    return Comparison(sizes, *columns)


def batches(found: list[list[int]], most_tokens: int) -> Iterator[mx.array]:
    """Yield ids (B, L) of neighbours of one length, at most so many tokens beyond one window."""
    start = 0
    while start < len(found):
        length = len(found[start])
        most = start + max(1, most_tokens // length)
        end = start + sum(len(window) == length for window in found[start:most])
        yield mx.array(found[start:end])
        start = end


def states(loaded: Loaded, found: list[list[int]]) -> Iterator[mx.array]:
    """Yield the states (rows, D) that predict a token, in order."""
    for ids in batches(found, loaded.plan.prefill_chunk):
        yield loaded.model.hidden(ids)[:, :-1].reshape(-1, loaded.args.hidden_size)


def differences(loaded: Loaded, kept: Kept, found: list[list[int]]) -> Iterator[tuple]:
    """Yield KL, same best token, and both losses, of some rows at a time."""
    start, targets = 0, mx.array([token for window in found for token in window[1:]])
    for rows in states(loaded, found):
        for first in range(0, len(rows), HEAD_ROWS):
            part = rows[first : first + HEAD_ROWS]
            at = slice(start, start + len(part))
            yield difference(loaded.model, part, kept.logits(at), targets[at])
            start += len(part)


def difference(model: Model, rows: mx.array, expected: mx.array, targets: mx.array) -> tuple:
    p, q = log_softmax(expected), log_softmax(model.lm_head(rows))
    kl = (mx.exp(p) * (p - q)).sum(-1)
    same = mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)
    losses = [-mx.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (q, p)]
    return tuple(map(np.array, (mx.maximum(kl, 0), same, *losses)))


def log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def check_numbers(folder: Folder, values: np.ndarray) -> None:
    """Refuse a model that computes no numbers, as `perplexity` does."""
    if not (mean := float(values.astype(np.float64).mean())) < MOST_NATS:
        raise UserError(
            f"`{folder.path}` computes {mean} nats per token, which is no loss of a model",
            f"`python -m convert verify {folder.path}` says whether its weights are damaged",
        )


def print_comparison(about: dict, found: dict[str, dict[str, float]]) -> None:
    """Print what was compared, and each figure with its interval."""

    def words(name: str, form: str) -> str:
        value, low, high = (format(found[name][key], form) for key in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    print(in_line(f"model      {about['model']}, reference {about['reference']}"))
    print(
        f"text       {about['tokens']:,} tokens in {about['windows']} windows of "
        f"{about['context']:,}, activations {about['activations']}"
    )
    tail = words("kl_p99", ".3g")
    print(f"KL         {words('kl', '.4g')} nats per token, 99th percentile {tail}")
    print(f"best token {words('best_token', '.2%')} alike")
    print(
        f"perplexity {words('perplexity', '.4f')}, reference {words('reference_perplexity', '.4f')}"
        f", ratio {words('perplexity_ratio', '.4f')}"
    )
    print(f"in brackets: 95 % intervals, {DRAWS:,} draws of the windows")


def as_json(about: dict, found: dict[str, dict[str, float]]) -> str:
    return json.dumps(about | {"draws": DRAWS} | found, allow_nan=False)
