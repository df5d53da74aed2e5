"""A reply as it comes -> its thoughts and its answer, told apart by `<think>` and `</think>`.

Models differ in where a thought begins: R1's template opens it, so that the reply starts inside;
R1-0528 opens it itself; V3.1's template opens it, or closes it at once. A tag may come in pieces,
and text that may be the start of one is held back. Knows no tokens and no messages.
"""

OPEN, CLOSE = "<think>", "</think>"


def split(reply: str) -> tuple[str, str]:
    """Return the thoughts of a whole reply and its answer, both as they were written."""
    before, closing, answer = reply.partition(CLOSE)
    return (before.lstrip().removeprefix(OPEN), answer) if closing else ("", reply)


class Thoughts:
    """Tells thoughts from the answer. `starts_inside` says that the prompt has opened a thought.

    Without `may_think` all of a reply is its answer. A tag counts where the model's template has
    it: an opening one before anything else, also after the prompt has opened the thought, a closing
    one within a thought. Line ends around a thought are no part of the answer.
    """

    def __init__(self, starts_inside: bool, may_think: bool = True):
        self.is_inside, self.may_open = starts_inside, may_think
        self.had_thought = starts_inside
        self._held, self._is_trimming = "", starts_inside

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """Return (is a thought, text) for what is decided now; either may be absent."""
        self._held += text
        out = []
        if self.may_open:
            start = self._held.lstrip()
            if OPEN.startswith(start[: len(OPEN)]) and len(start) < len(OPEN):
                return out  # white space, or the beginning of a tag
            self.may_open = False
            if start.startswith(OPEN):
                self._held = start.removeprefix(OPEN)
                self.is_inside = self.had_thought = self._is_trimming = True
        if self.is_inside:
            thought, closing, rest = self._held.partition(CLOSE)
            keep = 0 if closing else held_back(thought, CLOSE)
            self._held = rest if closing else thought[len(thought) - keep :]
            out += self._trimmed(True, thought[: len(thought) - keep])
            if not closing:
                return out
            self.is_inside, self._is_trimming = False, True
        held, self._held = self._held, ""
        return out + self._trimmed(False, held)

    def end(self) -> list[tuple[bool, str]]:
        """Return what was held back, at the end of the reply."""
        held, self._held, self.may_open = self._held, "", False
        return self._trimmed(self.is_inside, held)

    def _trimmed(self, is_thought: bool, text: str) -> list[tuple[bool, str]]:
        """Leave out the line ends that follow a tag."""
        if self._is_trimming:
            text = text.lstrip("\n")
            self._is_trimming = not text
        return [(is_thought, text)] if text else []


def held_back(text: str, tag: str) -> int:
    """Return how many last characters of a text may be the start of a tag."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
