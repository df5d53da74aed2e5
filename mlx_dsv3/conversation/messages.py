"""Messages of a chat and their token ids.

The chat template is rendered over the whole list of messages at every turn, as the model was
trained, and what the cache already holds is found by comparing ids: the longest common prefix.
Whatever the messages hold, roles and turns are the template's alone: no control token comes from
a message, but for the thoughts of a reply. No tensors here, and no knowledge of how a reply is
produced.
"""

import re
from collections.abc import Collection

from mlx_dsv3.conversation.template import (
    MOST_CHARACTERS,
    OF_THIS_MODEL,
    bounded,
    default_thinking,
    render,
    template_file,
)
from mlx_dsv3.conversation.thoughts import CLOSE, OPEN, Thoughts, split
from mlx_dsv3.errors import UserError

SURROGATE = re.compile("[\ud800-\udfff]")
# A zero-width space breaks a control token; where one holds it, another mark does.
MARKS = [chr(code) for code in (0x200B, 0x2060, *range(0xE000, 0xF900))]
KINDS = ("system", "questions", "answers", "thoughts")  # of text, in a prompt
THOUGHTS = (OPEN, CLOSE)  # by these templates cut off a reply's thoughts; tokens in the cache


def clean(text: str) -> str:
    """Replace what was not UTF-8, which terminals and command lines hand over as surrogates."""
    return SURROGATE.sub("\ufffd", text)


def control_tokens(tokenizer) -> list[str]:
    """Return the texts that become tokens wherever they stand; white space is no control token.

    Tokenizers on tiktoken keep `special_tokens` of which they tell transformers only a part.
    """
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    tokens += getattr(tokenizer, "special_tokens", ())
    return [token for token in dict.fromkeys(tokens) if token.strip()]


class Conversation:
    """The messages so far, as they were said; `prompt_ids` renders them for the next reply.

    `thinking` is the template's variable of that sense, None where it has none.
    """

    def __init__(self, tokenizer, system: str | None = None):
        self.tokenizer = tokenizer
        self.set_system(system)
        self.thinking = default_thinking(tokenizer)
        self.messages: list[dict] = []
        template = str(tokenizer.chat_template or "")
        self.knows_thoughts = OPEN in template or CLOSE in template
        self.takes_fields = "reasoning_content" in template
        self._control = control_tokens(tokenizer)
        held = set("".join(self._control))
        self._mark = next(mark for mark in MARKS if mark not in held)

    def disarm(self, text: str, spared: Collection[str] = ()) -> str:
        """Break control tokens inside a message, but those that are spared.

        `<｜User｜>` or `</think>` in a pasted text would otherwise become the token itself. A token
        may overlap itself, as in `｜DSML｜DSML｜`: one is broken again until none is left. The mark
        is part of no token, so that no new one comes of it.
        """
        for token in self._control:
            broken = token[0] + self._mark + token[1:] if token[1:] else self._mark
            while token in text and token not in spared:
                text = text.replace(token, broken)
        return text

    def set_system(self, text: str | None) -> None:
        self.system = clean(text) if text and text.strip() else None

    def set_thinking(self, is_on: bool) -> None:
        """Let the model think first, or not; refuse where the template has no such variable."""
        if self.thinking is None:
            raise UserError(
                f"the chat template in `{template_file(self.tokenizer)}` has no variable for "
                "thinking",
                "this model thinks always or never",
            )
        self.thinking = is_on

    def add_user(self, text: str) -> None:
        """Add a question; one before it that was left without a reply has an empty one."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.add_assistant("")
        self.messages.append({"role": "user", "content": clean(text)})

    def add_assistant(self, text: str) -> dict:
        """Add a reply and return it: it may grow as it comes."""
        self.messages.append({"role": "assistant", "content": text})
        return self.messages[-1]

    @property
    def num_questions(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def keep_questions(self, number: int) -> None:
        """Drop all that follows a question, the first is 1; refuse one that is not there."""
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise UserError("there is no question yet", "type one")
        if not 1 <= number <= len(places):
            raise UserError(
                f"there is no question {number}; the chat has {len(places)}",
                "`/show messages` numbers them",
            )
        del self.messages[places[number - 1] + 1 :]

    def undo(self) -> None:
        """Drop the last user message and what followed it."""
        while self.messages and self.messages.pop()["role"] != "user":
            pass

    def drop_unanswered(self) -> None:
        """Drop a last question whose reply was not begun: Ctrl-C struck between the two."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def clear(self) -> None:
        self.messages.clear()

    def prompt(self) -> str:
        """Return the text of the whole conversation up to the start of the next reply."""
        return self._rendered(KINDS)

    def _rendered(self, kinds: Collection[str]) -> str:
        """Return that text with what is of some kinds alone; of the others the content is empty."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [self._for_template(message, kinds) for message in system + self.messages]
        return clean(render(self.tokenizer, messages, self.thinking)) if messages else ""

    def _for_template(self, message: dict, kinds: Collection[str]) -> dict:
        """Return a message with the thoughts as a field of its own, where the template has one.

        Other templates are given what the model wrote, and cut the thoughts off themselves.
        """
        if message["role"] != "assistant":
            kind = "system" if message["role"] == "system" else "questions"
            return message | {"content": self.disarm(message["content"]) if kind in kinds else ""}
        content = self.disarm(message["content"], THOUGHTS)
        thought, answer = split(content) if self.knows_thoughts else ("", content)
        answer = answer if "answers" in kinds else ""
        if self.takes_fields:
            return message | {
                "content": answer,
                "reasoning_content": thought if "thoughts" in kinds else "",
            }
        return message | {"content": content if "thoughts" in kinds else answer}

    def shares(self) -> list[tuple[str, int]]:
        """Return by what kind of text, and the template's own, the context is filled, in tokens."""
        if self.messages:
            texts = [self._rendered(KINDS[:n]) for n in range(len(KINDS) + 1)]
        else:  # of which there is no prompt
            texts = ["", *[self.disarm(self.system or "")] * len(KINDS)]
        counts = [len(self.encode(text)) for text in texts]
        added = {kind: counts[i + 1] - counts[i] for i, kind in enumerate(KINDS)}
        shown = ("system", "questions", "thoughts", "answers")
        return [(kind, added[kind]) for kind in shown] + [("template", counts[0])]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that the template has written."""
        # The template writes the BOS token as text: encoding must not add a second one.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt_ids(self) -> list[int]:
        """Return the ids of `prompt`."""
        return self.encode(self.prompt())

    def thoughts(self, prompt: str) -> Thoughts:
        """Return what tells thoughts from the answer in the reply to a prompt."""
        end, knows = prompt.rstrip(), self.knows_thoughts
        return Thoughts(knows and end.endswith(OPEN), knows and not end.endswith(CLOSE))


def check_template(tokenizer, system: str | None = None, thinking: bool | None = None) -> None:
    """Render a first message: a template that cannot is refused before minutes of loading.

    So is `thinking`, if it is given, for a template without such a variable.
    """
    conversation = Conversation(tokenizer, system)
    if thinking is not None:
        conversation.set_thinking(thinking)
    conversation.add_user("Hello")
    with bounded(tokenizer):
        text = conversation.prompt()
    if "Hello" not in text or len(text) > MOST_CHARACTERS:
        without = "" if "Hello" in text else ", without the question"
        raise UserError(
            f"the chat template in `{template_file(tokenizer)}` writes {len(text):,} characters "
            f"for the question `Hello`{without}",
            OF_THIS_MODEL,
        )
