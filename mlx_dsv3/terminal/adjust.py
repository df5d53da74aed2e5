"""What may change while a chat is open: the numbers of a reply, drafts, thinking, the screen.

Each has the name and the words of its option. A change counts from the next reply on.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from mlx_dsv3.conversation.messages import check_template
from mlx_dsv3.conversation.settings import DEFAULTS
from mlx_dsv3.errors import UserError, in_line
from mlx_dsv3.options import SETTINGS

ON_OFF = ("off", "on")
STATS = ("line", "json", "off")
DRAFTS = ("auto", *"01234")


def nearest(word: str, words) -> str | None:
    """Return the word that was probably meant."""
    return next(iter(get_close_matches(word, words, 1, 0.5)), None)


def chosen(text: str, where: str, choices: tuple[str, ...]) -> str:
    """Return one of the choices, or refuse the text."""
    if text not in choices:
        raise UserError(
            f"{where} is `{text}`", f"choose {', '.join(choices[:-1])} or {choices[-1]}"
        )
    return text


def set_number(chat, name: str, text: str) -> None:
    """Change a number of the replies; `off` gives what holds where nothing is set."""
    key = name.replace("-", "_")
    try:
        value = DEFAULTS[key] if text == "off" else SETTINGS[key].parse(text, f"`/set {name}`")
    except UserError as error:
        hint = re.sub(r"`--([a-z-]+) ", r"`/set \1 ", error.hint)
        hint = hint.replace("leave it out", f"`/set {name} off`")
        raise UserError(error.message, hint) from None
    chat.session.settings[key] = value


def set_drafts(chat, name: str, text: str) -> None:
    """Change how many tokens are drafted; `off` drafts none."""
    text = "0" if text == "off" else text
    chat.session.set_drafts(chosen(text, "`/drafts`", DRAFTS))


def set_thinking(chat, name: str, text: str) -> None:
    chat.session.set_thinking(chosen(text, "`/think`", ON_OFF) == "on")


def set_system(chat, name: str, text: str) -> None:
    """Change the system prompt, or leave it out; a template may refuse it."""
    if text:
        check_template(chat.session.loaded.tokenizer, text)
    chat.session.set_system(text)


def set_switch(chat, name: str, text: str) -> None:
    setattr(chat.screen, name.replace("-", "_"), chosen(text, f"`/set {name}`", ON_OFF) == "on")


def set_stats(chat, name: str, text: str) -> None:
    chat.screen.stats = chosen(text, "`/set stats`", STATS)


@dataclass(frozen=True)
class Adjustable:
    """Something that `/set` changes, what it is now, and the words for Tab."""

    change: Callable
    now: Callable
    words: tuple[str, ...] = ()


def number_of(key: str) -> Adjustable:
    return Adjustable(set_number, lambda chat: chat.session.settings[key])


def switch_of(key: str) -> Adjustable:
    return Adjustable(set_switch, lambda chat: getattr(chat.screen, key), ON_OFF)


ADJUSTABLE = {key.replace("_", "-"): number_of(key) for key in DEFAULTS}
ADJUSTABLE |= {
    "drafts": Adjustable(set_drafts, lambda chat: chat.session.drafts, DRAFTS),
    "think": Adjustable(set_thinking, lambda chat: chat.session.thinking, ON_OFF),
    "system": Adjustable(set_system, lambda chat: chat.session.conversation.system),
    "stats": Adjustable(set_stats, lambda chat: chat.screen.stats, STATS),
}
ADJUSTABLE |= {key.replace("_", "-"): switch_of(key) for key in ("markdown", "hide_thinking")}


def find(name: str) -> Adjustable:
    """Return one of them, or refuse with the one that was probably meant."""
    if name not in ADJUSTABLE:
        meant = nearest(name, ADJUSTABLE)
        hint = f"did you mean `/set {meant}`?" if meant else "`/set` lists the settings"
        raise UserError(f"there is no setting `{name}`", hint)
    return ADJUSTABLE[name]


def change(chat, name: str, text: str) -> None:
    find(name).change(chat, name, text)


def shown(chat, name: str) -> str:
    """Return what one of them is now."""
    value = find(name).now(chat)
    if value is None:
        return "up to the model" if name == "think" else "none"
    return ON_OFF[value] if isinstance(value, bool) else str(value)


def settings_lines(chat) -> list[str]:
    return [f"  {name:<20}{in_line(shown(chat, name))}" for name in ADJUSTABLE]
