"""What the two models are trained on, as batches: conversations of the demo, text of the judge.

The demo's rows are whole conversations, in which the words of the user count little. The judge's
are pieces of running text.
"""

import random

import numpy as np
import torch

from demo import tokenizer

USER_WEIGHT = 0.1  # against 1 for the words of the assistant
SHAPES = ((16, 256), (16, 256), (16, 256), (4, 1024))  # rows x tokens; long rows for long chats
UNIT = 256  # tokens by which the judge's rows begin apart


def tokenise(tok, conversations) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids and loss weights of each rendered conversation."""
    assistant, end = tok.token_to_id(tokenizer.ASSISTANT), tok.token_to_id(tokenizer.EOS)
    pieces = []
    for encoding in tok.encode_batch(
        [tokenizer.render(c) for c in conversations], add_special_tokens=False
    ):
        ids = np.array(encoding.ids, dtype=np.int64)
        opened, closed = (ids == assistant).cumsum(), (ids == end).cumsum()
        inside = (opened > closed) & (ids != assistant) | (ids == end)  # the reply and its EOS
        pieces.append((ids, np.where(inside, 1.0, USER_WEIGHT).astype(np.float32)))
    return pieces


class Packer:
    """Fill rows with whole conversations, each opening with BOS; the last is cut."""

    def __init__(self, pieces, seed: int):
        self.pieces, self.rng = pieces, random.Random(seed)
        self.order = []
        self.epochs = 0

    def draw(self):
        if not self.order:
            self.order = list(range(len(self.pieces)))
            self.rng.shuffle(self.order)
            self.epochs += 1
        return self.pieces[self.order.pop()]

    def batch(self, rows: int, length: int):
        """Return ids and loss weights, both (rows, length + 1)."""
        batch = []
        for _ in range(rows):
            row, weight = self.draw()
            while len(row) < length + 1:
                more, more_weight = self.draw()
                row, weight = np.concatenate([row, more]), np.concatenate([weight, more_weight])
            batch.append((row[: length + 1], weight[: length + 1]))
        ids, weights = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
        return ids, weights


class Windows:
    """Rows of running text, each opening with BOS; every epoch cuts the text at other places."""

    def __init__(self, ids: np.ndarray, seed: int):
        self.ids, self.rng = ids, random.Random(seed)
        self.order, self.epochs = [], 0

    def batch(self, rows: int, length: int):
        """Return ids and loss weights (all 1), both (rows, length + 1)."""
        batch = np.zeros((rows, length + 1), np.int64)  # BOS has the id 0
        for row in batch:
            if not self.order:
                self.epochs += 1
                longest = max(tokens for _, tokens in SHAPES)
                first = self.rng.randrange(longest)
                self.order = list(range(first, len(self.ids) - longest, UNIT))
                self.rng.shuffle(self.order)
            start = self.order.pop()
            for _ in range(length // UNIT - 1):  # a long row takes the turns of several
                self.order and self.order.pop()
            row[1:] = self.ids[start : start + length]
        ids = torch.from_numpy(batch)
        return ids, torch.ones(ids.shape)
