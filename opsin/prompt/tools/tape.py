"""Text that arrives in pieces, read by a parser that waits for what has not come yet.

A parser is a generator over a `Tape`: each method below that may have to wait is a generator, which
yields where the text so far does not decide and goes on when more was fed. What a parser does
depends on the text alone, not on where its pieces were cut. Nothing is looked at twice but the few
characters that may be the start of a marker, so reading is linear in the text.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

_Result = TypeVar("_Result")

# A parser that yields where it waits for more text, and then returns its result.
Steps: TypeAlias = Generator[None, None, _Result]
Put: TypeAlias = Callable[[str], None]

SPACE = re.compile(r"[ \t\r\n]+")
_CLUTTER = re.compile(r"[ \t\r\n\]}]+")


class Markers:
    """Texts that are looked for together; none may hold another one."""

    def __init__(self, *texts: str) -> None:
        held = [(a, b) for a in texts for b in texts if a is not b and a in b]
        if held or not all(texts):
            raise ValueError(f"markers that hold one another cannot be told apart: {held}")
        self.texts = texts
        self.pattern = re.compile("|".join(re.escape(text) for text in texts))
        self._longest = max(len(text) for text in texts)

    def held_back(self, text: str, start: int) -> int:
        """Where the longest end of `text` (from `start`) begins that may become a marker."""
        for at in range(max(start, len(text) - self._longest + 1), len(text)):
            if any(marker.startswith(text[at:]) for marker in self.texts):
                return at
        return len(text)


class Tape:
    """The text fed so far and the place that reading has come to."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._kept: list[str] | None = None

    @property
    def is_over(self) -> bool:
        """Whether all text was read and no more will come."""
        return self._ended and self._at == len(self._text)

    def feed(self, text: str) -> None:
        """Add text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Say that no more text will come."""
        self._ended = True

    def keep(self) -> None:
        """Remember what is read from here on, until it is asked for."""
        self._kept = []

    def kept(self) -> str:
        """What was read since `keep`; it is not remembered further."""
        text = "".join(self._kept or ())
        self._kept = None
        return text

    def peek(self) -> Steps[str]:
        """The next character, not read; "" at the end of the text."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def next(self) -> Steps[str]:
        """The next character; "" at the end of the text."""
        char = yield from self.peek()
        self._read_to(self._at + len(char))
        return char

    def accept(self, text: str) -> Steps[bool]:
        """Read this text if it comes next."""
        while True:
            found = self._text[self._at : self._at + len(text)]
            if found == text:
                self._read_to(self._at + len(text))
                return True
            if self._ended or not text.startswith(found):
                return False
            yield

    def accept_any(self, markers: Markers) -> Steps[str]:
        """Read the one of these markers that comes next, if one does; "" otherwise."""
        for text in markers.texts:
            if (yield from self.accept(text)):
                return text
        return ""

    def run(self, pattern: re.Pattern[str], put: Put) -> Steps[None]:
        """Hand on the characters that come next and match, however many; `pattern` is `[...]+`."""
        while (yield from self.peek()):
            match = pattern.match(self._text, self._at)
            if match is None:
                return
            self._hand_on(match.end(), put)

    def word(self, pattern: re.Pattern[str]) -> Steps[str]:
        """The characters that come next and match, together; `pattern` is `[...]+`."""
        pieces: list[str] = []
        yield from self.run(pattern, pieces.append)
        return "".join(pieces)

    def spaces(self) -> Steps[None]:
        """Read white space."""
        yield from self.run(SPACE, drop)

    def until(self, markers: Markers, put: Put, unread: tuple[str, ...] = ()) -> Steps[str]:
        """Hand on the text before the first of these markers, which is read and returned.

        Returns "" if none comes before the end of the text. Markers in `unread` are only found.
        """
        while True:
            match = markers.pattern.search(self._text, self._at)
            if match is not None:
                self._hand_on(match.start(), put)
                return match[0] if match[0] in unread else self._read_to(match.end())
            over = self._ended
            end = len(self._text) if over else markers.held_back(self._text, self._at)
            self._hand_on(end, put)
            if over:
                return ""
            yield

    def leave_block(self, whole: bool, end: str, *others: str) -> Steps[None]:
        """Read the marker that ends a block of calls.

        After calls that were whole it may be missing, and brackets too many may stand before it. In
        a block that broke off, everything up to it, or up to one of the others, is dropped.
        """
        if whole:
            yield from self.run(_CLUTTER, drop)
            yield from self.accept(end)
            return
        yield from self.until(Markers(end, *others), drop, unread=others)

    def rest(self, put: Put) -> Steps[None]:
        """Hand on everything that is left."""
        while (yield from self.peek()):
            self._hand_on(len(self._text), put)

    def _hand_on(self, end: int, put: Put) -> None:
        piece = self._read_to(end)
        if piece:
            put(piece)

    def _read_to(self, end: int) -> str:
        piece = self._text[self._at : end]
        self._at = end
        if self._kept is not None:
            self._kept.append(piece)
        return piece


def drop(piece: str) -> None:
    """Where what nobody needs goes."""
