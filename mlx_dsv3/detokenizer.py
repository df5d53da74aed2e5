"""Token ids -> their text as they come: together the pieces are the text of all ids at once.

A token may hold a part of a character, which waits for the rest. mlx-lm's own drops the space that
a text begins with and prints byte 0 as another character: of 50 random texts of 2,000 tokens 46
differed with the demo's tokenizer and 21 with V3's (`tests/test_detokenizer.py` has such texts).
Knows no model.
"""

UNFINISHED = "\ufffd"  # what stands for bytes that are no character, or not yet


class Detokenizer:
    """Decodes the newest ids behind those before them, on which their text may depend."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before: list[int] = []  # whose text was returned
        self.newest: list[int] = []
        self.told = ""  # of both, what was returned

    def add(self, token: int) -> str:
        """Return what a token completes; it may be nothing."""
        self.newest.append(token)
        text = self._text()
        piece = text[len(self.told) :].rstrip(UNFINISHED)
        self.told += piece
        if piece and self.told == text:
            self.before, self.newest = self.newest, []
            self.told = self._text()
        return piece

    def end(self) -> str:
        """Return what waits for the rest of a character that does not come."""
        return self._text()[len(self.told) :]

    def _text(self) -> str:
        return self.tokenizer.decode(self.before + self.newest)
