"""Markdown -> the same characters with terminal attributes, while they come.

Attributes are all that is added. No character is dropped, moved or added, so that a code block is
copied as the model wrote it, and no cursor moves, so that a window may change its size. At most
HELD characters wait for the next one, which says whether they are a mark. How the text is cut into
pieces changes nothing: each character is taken by itself.

What begins on a line ends with it, but for a fenced block: a mark that a reply forgets to close
spoils one line. Tables are left alone.
"""

import re

from mlx_dsv3.terminal.drawing import RESET

HELD = 6
BOLD, ITALIC, CODE, LINK, MARK, QUOTE, HEADING = "1", "3", "36", "4", "35", "2", "1;35"
# At the beginning of a line: what may become a mark, and what has become one.
UNDECIDED = re.compile(r"#{1,6}|[-*+]|\d{1,3}[.)]?|`{1,2}|~{1,2}")
TITLE, ITEM, FENCE = re.compile(r"#{1,6}\s"), re.compile(r"([-*+]|\d+[.)])\s"), ("```", "~~~")
# `*` and `_` begin something after a space or a mark, of ASCII one of these; in scripts without
# spaces, from CJK on, `*` does anywhere.
BEFORE, CJK = frozenset("([{\"'-:*_~>,.;!?|"), "\u2e80"
STRENGTHS = {1: (ITALIC,), 2: (BOLD,), 3: (ITALIC, BOLD)}


class Markdown:
    """Takes one reply; `feed` returns what can be shown now, `end` the rest."""

    def __init__(self):
        self.out: list[str] = []
        self.style = ""  # of what was put last
        self.fence, self.line = "", ""  # the mark that opened a block, and the line within it
        self.begin_line()

    def begin_line(self) -> None:
        self.take = self.in_block if self.fence else self.at_start
        self.held = self.base = self.before = ""
        self.marks: dict[str, str] = {}  # what is on -> the character that began it
        self.ticks = self.code = self.link = 0
        self.is_escaped = False
        self.line = ""

    def feed(self, text: str) -> str:
        for character in text:
            if character == "\n":
                self.end_line()
            else:
                self.take(character)
        return self._flush()

    def end(self) -> str:
        """Return what was held back, and leave no attribute behind."""
        self._release()
        self.put("", "")
        return self._flush()

    def _flush(self) -> str:
        text, self.out = "".join(self.out), []
        return text

    def put(self, text: str, style: str | None = None) -> None:
        """Show a text, in the style of this place where none is given."""
        if style is None:
            style = ";".join([*filter(None, [self.base]), *sorted(self.marks)])
        if style != self.style:
            self.out.append(RESET * bool(self.style) + f"\x1b[{style}m" * bool(style))
            self.style = style
        self.out.append(text)

    def end_line(self) -> None:
        self._release()
        self.put("\n", "")
        mark = self.line.strip("> \t")
        if self.fence and mark.startswith(self.fence) and not mark.strip(self.fence[0]):
            self.fence = ""
        self.begin_line()

    def _release(self) -> None:
        """Decide about what is held, where no other character follows."""
        if self.take == self.at_start:
            self._as_text()
        if self.held:
            self._resolve(" ")

    # The beginning of a line

    def at_start(self, character: str) -> None:
        """Take a character before which a line has nothing but marks of blocks."""
        if not self.held and character in " \t":
            self.put(character)
            return
        self.held += character
        if self.held in FENCE:
            self.fence, self.take = self.held, self.in_fence
            self.put(self.held, CODE)
        elif character == ">" and len(self.held) == 1:
            self.base = QUOTE
            self.put(self.held)
        elif ITEM.fullmatch(self.held):
            self.put(self.held[:-1], MARK)
            self.put(character)
        elif TITLE.fullmatch(self.held):
            self.base, self.take = HEADING, self.in_text
            self.put(self.held)
        elif self.held == "|":
            self.take = self.put
            self.put(self.held)
        elif UNDECIDED.fullmatch(self.held):
            return
        else:
            self._as_text()
            return
        self.held = ""

    def _as_text(self) -> None:
        """Take what was held at the beginning of a line as ordinary text."""
        held, self.held, self.take = self.held, "", self.in_text
        for character in held:
            self.in_text(character)

    # Fenced blocks

    def in_fence(self, character: str) -> None:
        """Take a character of the line that opens a block."""
        if character == self.fence[0] and not self.line:
            self.fence += character
        elif character == "`" == self.fence[0]:  # no block, then: ```code``` within a line
            self.marks[CODE], self.code, self.ticks = character, len(self.fence), 1
            self.fence, self.take = "", self.in_text
        else:
            self.line = character
        self.put(character, CODE)

    def in_block(self, character: str) -> None:
        self.line += character
        self.put(character, CODE)

    # Text within a line

    def in_text(self, character: str) -> None:
        """Take a character of a line's text."""
        if self.held:
            if character == self.held[0]:
                self._hold(character)
                return
            self._resolve(character)
        if (self.code or self.ticks) and self._in_code(character):
            return
        if self.is_escaped or character == "\\":
            self.is_escaped = not self.is_escaped
            self.put(character)
        elif self.link:
            self._in_link(character)
        elif character == "`":
            self.marks[CODE], self.ticks = character, 1
            self.put(character)
        elif character in "*_" and self.before != 2 * character:
            self._hold(character)
            return
        else:
            self.put(character)
            self.link = int(character == "(" and self.before == "]")
        if self.before != 2 * character:
            self.before = character

    def _hold(self, character: str) -> None:
        """Hold a run of `*` or `_`; more than three of them are no mark."""
        self.held += character
        if len(self.held) > 3:
            self.put(self.held)
            self.held, self.before = "", 2 * character

    def _resolve(self, after: str) -> None:
        """Let a run of `*` or `_` begin something, end it, or be what it is."""
        run, self.held = self.held, ""
        mark, before, kinds = run[0], self.before, STRENGTHS[len(run)]
        on = [kind for kind in kinds if self.marks.get(kind) == mark]
        can_end = before and not before.isspace() and (mark == "*" or not after.isalnum())
        is_mark = before in BEFORE or not before.isascii() and not before.isalnum()
        is_free = not before.strip() or is_mark or mark == "*" and before >= CJK
        if not on and is_free and not after.isspace():
            self.marks |= {kind: mark for kind in kinds if kind not in self.marks}
        self.put(run)
        for kind in on if can_end else ():
            del self.marks[kind]
        self.before = mark

    def _in_code(self, character: str) -> bool:
        """Take a character of `code`, which ends with as many ticks as began it."""
        if character == "`":
            self.ticks += 1
        elif self.code == self.ticks:
            self.ticks = self.code = 0
            del self.marks[CODE]
            self.before = "`"
            return False
        else:
            self.code, self.ticks = self.code or self.ticks, 0
        self.put(character)
        return True

    def _in_link(self, character: str) -> None:
        """Take a character of the address in [text](address)."""
        self.link += {"(": 1, ")": -1}.get(character, 0)
        if not self.link or character.isspace():
            self.link = 0
            self.put(character)
        else:
            self.marks[LINK] = "("
            self.put(character)
            del self.marks[LINK]
