"""A conversation with a loaded model: each reply is a stream of events.

`Prefill` says how far the prompt is, a `Text` comes for each piece of a thought or of the answer,
then one `End`, which holds why the reply ended and what it took. Whoever reads them shows them: a
terminal, a pipe, an endpoint. Nothing is printed here.

A reply that is stopped keeps what was said: after Ctrl-C an `End` follows, and a reader that has
enough closes the iterator. One that fails leaves the conversation as it was. So that both hold for
a reader's own troubles too, it throws them into the iterator: `events.throw(error)`.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.conversation.reply import End, Reply, Text
from mlx_dsv3.conversation.settings import DEFAULTS, make_sampler
from mlx_dsv3.conversation.transcript import Transcript
from mlx_dsv3.decoding.state import State, load_state
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.generate import Prefill, make_control, make_state, run
from mlx_dsv3.load import Loaded

Event = Prefill | Text | End


class Session:
    """Messages, caches and settings of one conversation.

    `settings` holds the numbers of a reply by the names of `settings.DEFAULTS`; they may change
    between replies, and what is not given is as there.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        system: str | None = None,
        settings: Mapping[str, object] = DEFAULTS,
        drafts: str | int = "auto",
    ):
        self.loaded, self.settings = loaded, {**DEFAULTS, **settings}
        self.drafts, self.control = drafts, make_control(loaded, drafts)
        self.conversation = Conversation(loaded.tokenizer, system)
        self.takes = 0  # other replies to the last question
        self._reply_now: Reply | None = None  # while it comes
        self.renew_state()

    def renew_state(self) -> None:
        """Begin with empty caches, which the next reply fills with what the conversation holds."""
        self.state = make_state(self.loaded, with_drafts=self.control.fixed != 0)

    def set_drafts(self, drafts: str | int) -> None:
        """Draft so many tokens at each step, or `auto`; what drafting costs is learnt anew."""
        self.drafts, self.control = drafts, make_control(self.loaded, drafts)
        if (self.state.mtp_cache is None) != (self.control.fixed == 0 or self.loaded.mtp is None):
            self.renew_state()

    @property
    def messages(self) -> list[dict]:
        """Return what has been said; of a reply that comes, as if it were stopped now."""
        return self._reply_now.messages() if self._reply_now else self.conversation.messages

    @property
    def thinking(self) -> bool | None:
        """Say whether the model is to think first; None where its template has no such variable."""
        return self.conversation.thinking

    def set_thinking(self, is_on: bool) -> None:
        """Let the model think first, or not, from the next reply on."""
        self.conversation.set_thinking(is_on)

    def set_system(self, text: str | None) -> None:
        """Change the system prompt, or leave it out, from the next reply on."""
        self.conversation.set_system(text)

    def context(self) -> list[tuple[str, int]]:
        """Return the tokens of the conversation by what fills the context."""
        return self.conversation.shares()

    def turn(self, text: str) -> Iterator[Event]:
        """Answer one message; after a failure the conversation is as it was before."""
        before = list(self.conversation.messages)
        self.conversation.add_user(text)
        return self._answer(before, takes=0)

    def regenerate(self) -> Iterator[Event]:
        """Answer the last question otherwise, with the noise of another seed.

        Until the first token comes the reply before can be had back: by Ctrl-C, or by closing.
        """
        return self._again(self.conversation.num_questions, self.takes + 1)

    def retry(self, number: int) -> Iterator[Event]:
        """Answer a question again, the first is 1, and forget what followed it."""
        return self._again(number, 0)

    def _again(self, number: int, takes: int) -> Iterator[Event]:
        before = list(self.conversation.messages)
        self.conversation.keep_questions(number)
        return self._answer(before, takes, before)

    def _answer(
        self, before: list[dict], takes: int, instead: list[dict] | None = None
    ) -> Iterator[Event]:
        """Answer the last message; after a failure the messages are those before again.

        `instead` are those that stay where an answer is to replace another and nothing comes.
        """
        kept = before, self.takes
        try:
            end = yield from self._reply(takes, instead)
        except GeneratorExit:
            raise
        except BaseException as error:  # a second Ctrl-C too
            self.conversation.messages, self.takes = kept
            if isinstance(error, Exception) and not isinstance(error, UserError):
                self.renew_state()  # what such an error leaves in the caches is not known
            raise
        try:
            yield end
        except Exception:  # a Ctrl-C that strikes now finds the reply said
            self.conversation.messages, self.takes = kept
            raise

    def _reply(self, takes: int, instead: list[dict] | None) -> Generator[Event, None, End]:
        """Answer the conversation as it stands; its last message grows with what is said."""
        before, takes_before = self._counters(), self.takes
        reply, self.takes = Reply(self.conversation, instead), takes
        events = run(
            self.loaded,
            self.conversation.encode(reply.prompt),
            max_tokens=self.settings["max_tokens"],
            sampler=make_sampler(self.settings | {"seed": self.settings["seed"] + takes}),
            control=self.control,
            state=self.state,
        )
        self._reply_now = reply
        try:
            with suppress(KeyboardInterrupt), closing(events):
                for event in events:
                    yield from [event] if isinstance(event, Prefill) else reply.add(event)
        finally:
            self.conversation.messages, self._reply_now = reply.messages(), None
            if reply.is_lost:
                self.takes = takes_before
        return reply.end({i: count - before[i] for i, count in self._counters().items()})

    def _counters(self) -> dict[int, Counters]:
        """Return a copy of the counters of each streamed layer."""
        banks = self.loaded.store.banks.items()
        return {i: replace(bank.counters) for i, bank in banks if not bank.is_resident}

    def restore(self, transcript: Transcript, cache: Path | None = None) -> str | None:
        """Go on with a saved chat; after a refusal the session is as it was.

        A cache that was saved with it spares the computation. Where it cannot be used the reason
        is returned, and the next reply computes the prompt.
        """
        conversation = Conversation(self.loaded.tokenizer, transcript.system)
        conversation.messages = [dict(message) for message in transcript.messages]
        if conversation.thinking is not None and transcript.thinking is not None:
            conversation.thinking = transcript.thinking
        if conversation.messages:
            conversation.prompt()  # a template may refuse it
        drafts = transcript.drafts if self.loaded.mtp is not None else self.drafts
        control = make_control(self.loaded, drafts)
        state, problem = self._saved_state(cache, control.fixed != 0)
        self.conversation, self.settings = conversation, {**DEFAULTS, **transcript.settings}
        self.drafts, self.control, self.state, self.takes = drafts, control, state, 0
        return problem

    def _saved_state(self, cache: Path | None, with_drafts: bool) -> tuple[State, str | None]:
        """Return the state of a file, or an empty one and why that file cannot be used."""
        empty = make_state(self.loaded, with_drafts)
        if cache is None:
            return empty, None
        try:
            state = load_state(cache, self.loaded.model)
        except (UserError, OSError) as error:
            return empty, getattr(error, "message", str(error))
        if empty.mtp_cache is None:
            state.drop_mtp()
        elif state.mtp_cache is None:
            return empty, f"`{cache}` was saved without drafts"
        return state, None

    def clear(self) -> None:
        """Forget the messages; the system prompt stays."""
        self.conversation.clear()
