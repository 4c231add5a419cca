"""What a chat shows: Markdown as it comes, and small previews of pictures where terminals can."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opsin.config import variables

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console, RenderableType
    from rich.live import Live

PREVIEW = (320, 200)  # pixels, at most
SIXEL_COLOURS = 64
THOUGHT_LINES = 4  # of the reasoning that are seen while it is written
REDRAW = 0.08  # seconds between two drawings of a growing block
_SIGNS = (
    "TERM",
    "TERM_PROGRAM",
    "KITTY_WINDOW_ID",
    "LC_TERMINAL",
    "TMUX",
    "STY",
    "NO_COLOR",
)


class Answer:
    """Shows one answer as Markdown while it comes; as plain text where there is no terminal.

    Finished blocks are printed for good; only the last one is drawn again, so that an answer longer
    than the screen scrolls as any text does. Reasoning is folded to one line when the answer
    begins; it stays whole where nobody can ask for it again (`folds`), and beside an answer that
    goes on to a file, it goes to `aside`.
    """

    def __init__(
        self, console: Console, aside: Console | None = None, *, folds: bool = True
    ) -> None:
        self.console = console
        self.aside = aside
        self.folds = folds
        self.text = ""
        self.thoughts = ""
        self._began = 0.0
        self._tail = ""
        self._live: Live | None = None
        self._drawn = 0.0

    def think(self, text: str) -> None:
        """Show that it thinks: the last lines, dimmed, until the answer begins."""
        if not self.thoughts:
            self._began = time.monotonic()
        self.thoughts += text
        if not self.console.is_terminal and self.aside is not None:
            self.aside.print(text, style="dim", markup=False, soft_wrap=True, end="")
        if self.console.is_terminal and not self.text:
            from rich.text import Text

            lines = self.thoughts.rstrip().splitlines()[-THOUGHT_LINES:]
            wide = self.console.width
            self._show(Text("Thinking...\n" + "\n".join(f"  {x}"[-wide:] for x in lines), "dim"))

    def push(self, text: str) -> None:
        """Show more of the answer."""
        if text and not self.text:
            self._fold()
        self.text += text
        if not self.console.is_terminal:
            self.console.file.write(text)
            self.console.file.flush()
            return
        self._tail += text
        done, self._tail = split_blocks(self._tail)
        if done.strip():
            self._end_live()
            self._print(done)
        self._draw()

    def close(self) -> None:
        """End the answer, whether or not it is whole."""
        if not self.text:
            self._fold()
        if not self.console.is_terminal:
            self.console.file.write("\n")
            self.console.file.flush()
            return
        self._end_live()
        if self._tail.strip():
            self._print(self._tail)
        self._tail = ""

    def _fold(self) -> None:
        """Put one line in the place of the reasoning, or end it."""
        self._end_live()
        if not self.thoughts.strip():
            return
        if not self.console.is_terminal:
            if self.aside is not None and not self.thoughts.endswith("\n"):
                self.aside.print()
            return
        seconds = time.monotonic() - self._began
        line = f"(thought for {seconds:.0f} s; /thinking shows it)"
        shown = line if self.folds else self.thoughts.strip()
        self.console.print(shown, style="dim", markup=False, soft_wrap=True)

    def _draw(self) -> None:
        from rich.markdown import Markdown

        self._show(Markdown(self._tail))

    def _show(self, block: RenderableType) -> None:
        from rich.live import Live

        if self._live is None:
            # Transient: what it showed is printed for good when the block is done.
            self._live = Live(console=self.console, transient=True, auto_refresh=False)
            self._live.start()
        now = time.monotonic()
        if now - self._drawn >= REDRAW:
            self._drawn = now
            self._live.update(block, refresh=True)

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        self.console.print(Markdown(text))

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def split_blocks(text: str) -> tuple[str, str]:
    """The finished blocks of Markdown, and the one that may still grow.

    A blank line ends a block unless it stands in fenced code; a list or a table also ends there.
    """
    end = 0
    fence = ""
    place = 0
    for line in text.splitlines(keepends=True):
        place += len(line)
        bare = line.strip()
        if fence:
            if bare.startswith(fence) and not bare.strip(fence[0]):
                fence = ""
        elif bare.startswith(("```", "~~~")):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
        elif not bare and line.endswith("\n"):
            end = place
    return text[:end], text[end:]


def preview_protocol(environment: Mapping[str, str] | None = None) -> str | None:
    """How this terminal shows pictures, by its environment: kitty, iterm, sixel, or None."""
    signs = variables(_SIGNS) if environment is None else environment
    term, program = signs.get("TERM", ""), signs.get("TERM_PROGRAM", "")
    if "TMUX" in signs or "STY" in signs or term.startswith(("screen", "tmux", "dumb")):
        return None  # they pass no pictures on
    if "KITTY_WINDOW_ID" in signs or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or signs.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    if "sixel" in term or program in ("mintty",) or term.startswith(("foot", "mlterm", "yaft")):
        return "sixel"
    return None


def preview(image: Image.Image, protocol: str) -> bytes:
    """What to write to the terminal to show a small copy of the picture."""
    small = image.convert("RGB")
    small.thumbnail(PREVIEW)
    if protocol == "sixel":
        return sixel(small) + b"\n"
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue())
    if protocol == "iterm":
        head = f"\x1b]1337;File=inline=1;size={len(buffer.getvalue())}:".encode()
        return head + data + b"\a\n"
    pieces = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    out = []
    for number, piece in enumerate(pieces):
        first = "f=100,a=T," if number == 0 else ""
        more = int(number + 1 < len(pieces))
        out.append(f"\x1b_G{first}m={more};".encode() + piece + b"\x1b\\")
    return b"".join(out) + b"\n"


def sixel(image: Image.Image) -> bytes:
    """A picture in DEC's sixel encoding: bands of six rows, one colour after another."""
    reduced = image.quantize(SIXEL_COLOURS)
    palette = (reduced.getpalette() or [])[: 3 * SIXEL_COLOURS]
    colours = [palette[at : at + 3] for at in range(0, len(palette), 3)]
    width, height = reduced.size
    pixels = reduced.tobytes()
    out = [f'\x1bPq"1;1;{width};{height}']
    for number, colour in enumerate(colours):
        shares = ";".join(str(round(value * 100 / 255)) for value in colour)
        out.append(f"#{number};2;{shares}")
    for top in range(0, height, 6):
        rows = [pixels[y * width : (y + 1) * width] for y in range(top, min(top + 6, height))]
        for colour_number in sorted(set(b"".join(rows))):
            codes = [
                sum((row[x] == colour_number) << bit for bit, row in enumerate(rows))
                for x in range(width)
            ]
            out.append(f"#{colour_number}{_run_lengths(codes)}$")
        out.append("-")
    return "".join(out).encode() + b"\x1b\\"


def _run_lengths(codes: list[int]) -> str:
    out = []
    at = 0
    while at < len(codes):
        end = at
        while end < len(codes) and codes[end] == codes[at]:
            end += 1
        letter = chr(63 + codes[at])
        out.append(letter * (end - at) if end - at < 4 else f"!{end - at}{letter}")
        at = end
    return "".join(out)
