"""A reply as it comes: its text so far, told into thoughts and answer, and what it leaves behind.

Whenever it stops it is whole: a thought is closed, and where it was to replace another reply and
nothing came, that one stays. Knows no loaded model and no caches.
"""

from dataclasses import dataclass

from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.conversation.thoughts import CLOSE
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.generate import Piece, Stats


@dataclass(frozen=True)
class Text:
    """What a token completes, of the answer or of a thought; it may be nothing."""

    text: str
    is_thought: bool = False


@dataclass(frozen=True)
class End:
    """The end of a reply: `stop`, `length` (a limit was reached) or `interrupted` (Ctrl-C).

    `stats` are None where no token came. `layers` holds the counters of each streamed layer.
    `text` is the whole answer and `reasoning` the thought before it.
    """

    finish_reason: str
    stats: Stats | None
    layers: dict[int, Counters]
    text: str = ""
    reasoning: str = ""


class Reply:
    """The reply to a conversation's last message; `instead` are the messages it is to replace."""

    def __init__(self, conversation: Conversation, instead: list[dict] | None = None):
        self.conversation, self.instead = conversation, instead
        self.prompt = conversation.prompt()
        self.thoughts = conversation.thoughts(self.prompt)
        self.message = conversation.add_assistant("")
        self.parts = {True: "", False: ""}
        self.stats, self.finish_reason = None, "interrupted"

    @property
    def is_lost(self) -> bool:
        """Say whether nothing came of what was to replace another reply."""
        return self.stats is None and self.instead is not None

    def add(self, piece: Piece) -> list[Text]:
        """Add a token and return what it completes; there is always something to show."""
        self.stats = piece.stats
        self.message["content"] += piece.text
        texts = self.thoughts.feed(piece.text)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            texts += self.thoughts.end()
        return self._told(texts or [(self.thoughts.is_inside, "")])

    def _told(self, texts: list[tuple[bool, str]]) -> list[Text]:
        for is_thought, text in texts:
            self.parts[is_thought] += text
        return [Text(text, is_thought) for is_thought, text in texts]

    def messages(self) -> list[dict]:
        """Return the messages of the conversation as they are if it stops now."""
        messages, said = self.conversation.messages, self.message["content"]
        if self.is_lost:
            return self.instead
        if self.thoughts.is_inside and said:  # or the template would take it for the answer
            return [*messages[:-1], self.message | {"content": said + CLOSE}]
        return messages

    def end(self, layers: dict[int, Counters]) -> End:
        """Return the last event, after Ctrl-C too, which leaves what may have begun a tag."""
        self._told(self.thoughts.end())
        answer, thought = self.parts[False], self.parts[True]
        return End(self.finish_reason, self.stats, layers, answer, thought)
