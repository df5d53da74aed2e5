"""A conversation with a loaded model: each turn is a stream of events.

A `Text` for each token, then one `End`, which holds why the reply ended and what it took. Whoever
reads them shows them: a terminal, a pipe, an endpoint. Nothing is printed here.

A turn that is stopped keeps what was said: after Ctrl-C an `End` follows, and a reader that has
enough closes the iterator. A turn that fails leaves no message. So that both hold for a reader's
own troubles too, it throws them into the iterator: `events.throw(error)`.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.generate import Stats, make_control, make_state, stream
from mlx_dsv3.load import Loaded


@dataclass(frozen=True)
class Text:
    """The text that a token completes, which may be none."""

    text: str


@dataclass(frozen=True)
class End:
    """The end of a reply: `stop`, `length` (a limit was reached) or `interrupted` (Ctrl-C).

    `stats` are None where no token came. `layers` holds the counters of each streamed layer.
    """

    finish_reason: str
    stats: Stats | None
    layers: dict[int, Counters]


Event = Text | End


class Session:
    """Messages, caches and settings of one conversation. `sampler` and `max_tokens` may change."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        system: str | None = None,
        sampler: Sampler | None = None,
        max_tokens: int | None = None,
        drafts: str | int = "auto",
    ):
        self.loaded, self.sampler, self.max_tokens = loaded, sampler, max_tokens
        self.control = make_control(loaded, drafts)
        self.conversation = Conversation(loaded.tokenizer, system)
        self.renew_state()

    def renew_state(self) -> None:
        """Begin with empty caches, which the next turn fills with what the conversation holds."""
        self.state = make_state(self.loaded, with_drafts=self.control.fixed != 0)

    def turn(self, text: str) -> Iterator[Event]:
        """Answer one message; after a failure the conversation is as it was before."""
        self.conversation.add_user(text)
        try:
            end = yield from self._reply()
        except GeneratorExit:
            raise
        except BaseException as error:  # a second Ctrl-C too
            self.conversation.undo()
            if isinstance(error, Exception) and not isinstance(error, UserError):
                self.renew_state()  # what such an error leaves in the caches is not known
            raise
        try:
            yield end
        except Exception:  # a Ctrl-C that strikes now finds the reply said
            self.conversation.undo()
            raise

    def _reply(self) -> Generator[Text, None, End]:
        """Answer the conversation as it stands; its last message grows with what is said."""
        stats, reason, before = None, "interrupted", self._counters()
        ids = self.conversation.prompt_ids()
        self.conversation.add_assistant("")
        pieces = stream(
            self.loaded,
            ids,
            max_tokens=self.max_tokens,
            sampler=self.sampler,
            control=self.control,
            state=self.state,
        )
        with suppress(KeyboardInterrupt), closing(pieces):
            for piece in pieces:
                self.conversation.messages[-1]["content"] += piece.text
                stats, reason = piece.stats, piece.finish_reason or reason
                yield Text(piece.text)
        layers = {i: count - before[i] for i, count in self._counters().items()}
        return End(reason, stats, layers)

    def _counters(self) -> dict[int, Counters]:
        """Return a copy of the counters of each streamed layer."""
        banks = self.loaded.store.banks.items()
        return {i: replace(bank.counters) for i, bank in banks if not bank.is_resident}

    def clear(self) -> None:
        """Forget the messages; the system prompt stays."""
        self.conversation.clear()
