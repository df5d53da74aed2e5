"""Messages of a chat and their token ids.

The chat template is rendered over the whole list of messages at every turn, as the model was
trained, and what the cache already holds is found by comparing ids: the longest common prefix.
No tensors here, and no knowledge of how a reply is produced.
"""

import re

SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Replace what was not UTF-8, which terminals and command lines hand over as surrogates."""
    return SURROGATE.sub("\ufffd", text)


class Conversation:
    """The messages so far; `prompt_ids` renders them for the next reply."""

    def __init__(self, tokenizer, system: str | None = None):
        self.tokenizer = tokenizer
        self.system = clean(system) if system else None
        self.messages: list[dict] = []
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
        longest_first = sorted(tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def disarm(self, text: str) -> str:
        """Break control tokens inside user text with a zero-width space.

        `<｜User｜>` or `</think>` in a pasted text would otherwise become the token itself.
        """
        if self._control is None:
            return text
        return self._control.sub(lambda match: f"{match[0][0]}\u200b{match[0][1:]}", text)

    def add_user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": self.disarm(clean(text))})

    def add_assistant(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> None:
        """Drop the last user message and what followed it."""
        while self.messages and self.messages.pop()["role"] != "user":
            pass

    def clear(self) -> None:
        self.messages.clear()

    def prompt_ids(self) -> list[int]:
        """Return the ids of the whole conversation up to the start of the next reply."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = self.tokenizer.apply_chat_template(
            system + self.messages, tokenize=False, add_generation_prompt=True
        )
        # The template writes the BOS token as text: encoding must not add a second one.
        return self.tokenizer.encode(text, add_special_tokens=False)
