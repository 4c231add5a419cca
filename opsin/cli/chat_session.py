"""A conversation in a terminal: its turns, what is attached to the next one, and the commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsin.errors import InputError, OpsinError
from opsin.media.limits import DEFAULT_LIMITS
from opsin.types import Media, Message, Part, Text

HELP = {
    "/image FILE...": "show it pictures or PDF pages with your next message",
    "/audio FILE...": "let it hear sounds",
    "/video FILE...": "show it videos",
    "/system TEXT": "set the system message; without TEXT, remove it",
    "/thinking": "show what it thought before its last answer",
    "/clear": "forget the conversation and what is attached",
    "/save FILE": "write the conversation as Markdown, or as JSON if FILE ends in .json",
    "/help": "this list",
    "/exit": "leave (Ctrl-D does too)",
}
COMMANDS = tuple(line.split()[0] for line in HELP)
ENDINGS = {
    "image": "png jpg jpeg webp gif tif tiff bmp avif heic heif pdf",
    "audio": "wav mp3 flac ogg opus m4a aac",
    "video": "mp4 mov mkv webm avi m4v",
}
_KINDS = {f".{ending}": kind for kind, endings in ENDINGS.items() for ending in endings.split()}


@dataclass(frozen=True, slots=True)
class Attached:
    """A medium ready for a message, the name it is shown by, and a picture of it for preview."""

    name: str
    media: tuple[Media, ...]

    @property
    def pictures(self) -> list[Any]:
        """The pictures it holds, decoded."""
        return [item.source for item in self.media if item.kind == "image"]


@dataclass(slots=True)
class Session:
    """The state of a chat. `modalities` are what the model takes beside text."""

    modalities: Sequence[str]
    sampling_rate: int = 16_000
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    attached: list[Attached] = field(default_factory=list)
    thoughts: str = ""  # before the last answer
    names: dict[int, str] = field(default_factory=dict)  # of media, by identity, for saving

    def attach(self, kind: str, path: str) -> Attached:
        """Read a medium for the next message; raises OpsinError for one that cannot be used."""
        if kind not in self.modalities:
            takes = ", ".join(("text", *self.modalities))
            raise InputError(f"This model does not take {kind}", why=f"it takes {takes}")
        attached = Attached(path, read_media(kind, path, self.sampling_rate))
        self.names.update((id(item), path) for item in attached.media)
        self.attached.append(attached)
        return attached

    def ask(self, text: str) -> list[Message]:
        """The conversation with a new message of the user, media first."""
        media: list[Part] = [item for attached in self.attached for item in attached.media]
        self.turns.append(Message("user", (*media, Text(text))))
        self.attached = []
        system = [] if self.system is None else [Message("system", (Text(self.system),))]
        return [*system, *self.turns]

    def answered(self, text: str) -> None:
        """Keep an answer, or as much of it as came."""
        self.turns.append(Message("assistant", (Text(text),)))

    def failed(self) -> None:
        """Take back a message that got no answer."""
        self.turns.pop()

    def clear(self) -> None:
        """Forget the turns and what is attached; the system message stays."""
        self.turns.clear()
        self.attached.clear()
        self.thoughts = ""

    def save(self, path: Path) -> None:
        """Write the conversation: JSON that `generate` takes back, or Markdown."""
        text = self.json() if path.suffix.lower() == ".json" else self.markdown()
        try:
            path.expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written", why=error.strerror or "") from error

    def json(self) -> str:
        """The messages, media by the names they were given."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        made: list[dict[str, Any]] = [*messages]
        for turn in self.turns:
            parts = [self._part(part) for part in turn.content]
            made.append({"role": turn.role, "content": parts})
        return json.dumps(made, ensure_ascii=False, indent=1) + "\n"

    def _part(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        name = self.names.get(id(part), "")
        if "page" in part.options:
            return {"type": "file", "file": {"path": name}, "pages": [part.options["page"]]}
        return {"type": part.kind, part.kind: name}

    def markdown(self) -> str:
        """The turns under headings."""
        blocks = [] if self.system is None else [f"## System\n\n{self.system}"]
        for turn in self.turns:
            lines = [f"*{item.kind}: {self.names.get(id(item), '')}*" for item in turn.media]
            shown = "\n".join([*lines, "", turn.text] if lines else [turn.text])
            blocks.append(f"## {turn.role.capitalize()}\n\n{shown}")
        return "\n\n".join(blocks) + "\n"


def read_media(kind: str, path: str, sampling_rate: int) -> tuple[Media, ...]:
    """A file or URL as media that need not be read again; a PDF file is its pages."""
    from opsin.media import load_audio, load_image, load_pages
    from opsin.media.document import is_pdf

    if kind == "audio":
        return (Media("audio", (load_audio(path, DEFAULT_LIMITS, sampling_rate), sampling_rate)),)
    if kind == "video":
        if "://" not in path and not Path(path).expanduser().is_file():
            raise InputError(f"There is no file {path}", remedy="Check the path")
        return (Media("video", str(Path(path).expanduser()) if "://" not in path else path),)
    if is_pdf(path):
        return tuple(Media("image", p.image, {"page": p.number}) for p in load_pages(path))
    return (Media("image", load_image(path)),)


def split_pasted(line: str) -> tuple[list[tuple[str, str]], str]:
    """Media files whose paths stand in a line, as (kind, path), and the words that are left.

    Terminals paste a dropped file as its path, quoted or with backslashes before spaces.
    """
    try:
        words = shlex.split(line)
    except ValueError:
        return [], line
    found = [(kind, word) for word in words if (kind := kind_of(word)) is not None]
    if not found:
        return [], line
    paths = {path for _, path in found}
    left = [word for word in words if word not in paths]
    return found, " ".join(left)


def kind_of(word: str) -> str | None:
    """What kind of media file a word names, None if it names none that exists."""
    kind = _KINDS.get(Path(word).suffix.lower())
    try:
        return kind if kind is not None and Path(word).expanduser().is_file() else None
    except (OSError, RuntimeError):
        return None


class Commands:
    """What lines with a slash do.

    `say` prints a line about what was done and `tell` one that was asked for; `show` is told of
    what was attached. `refused` counts the lines that could not be obeyed.
    """

    def __init__(
        self,
        session: Session,
        say: Callable[[str], None],
        tell: Callable[[str], None],
        show: Callable[[Attached], None],
    ) -> None:
        self.session = session
        self.say = say
        self.tell = tell
        self.show = show
        self.refused = 0

    def refuse(self, line: str) -> None:
        """Say why a line was not obeyed."""
        self.refused += 1
        self.say(line)

    def run(self, line: str) -> bool:
        """Do what the line says; False to leave."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name in ("/image", "/audio", "/video"):
            self._attach(name[1:], rest)
        elif name == "/clear":
            self.session.clear()
            self.say("The conversation is empty again.")
        elif name == "/system":
            self.session.system = rest or None
            self.say("The system message is set." if rest else "There is no system message.")
        elif name == "/thinking":
            self.tell(self.session.thoughts or "It did not think before its last answer.")
        elif name == "/save":
            self._save(rest)
        elif name == "/help":
            for usage, about in HELP.items():
                self.tell(f"  {usage:<16}{about}")
        else:
            self.refuse(f"There is no command {name}; /help lists them.")
        return True

    def attach_all(self, found: Sequence[tuple[str, str]]) -> bool:
        """Attach files of known kinds; whether all could be."""
        fine = True
        for kind, path in found:
            try:
                attached = self.session.attach(kind, str(Path(path).expanduser()))
            except OpsinError as error:
                self.refuse(error.line())
                fine = False
                continue
            count = len(attached.media)
            pages = f" ({count} pages)" if count > 1 else ""
            self.say(f"Attached {Path(path).name}{pages}.")
            self.show(attached)
        return fine

    def _attach(self, kind: str, rest: str) -> None:
        try:
            paths = shlex.split(rest)
        except ValueError:
            paths = [rest]
        if not paths:
            self.refuse(f"Name a file: /{kind} FILE")
            return
        if "://" not in rest and Path(rest).expanduser().is_file():
            paths = [rest]  # spaces without quotes
        self.attach_all([(kind, path) for path in paths])

    def _save(self, rest: str) -> None:
        if not rest:
            self.refuse("Name a file: /save FILE")
            return
        try:
            self.session.save(Path(rest))
        except OpsinError as error:
            self.refuse(error.line())
            return
        self.say(f"Saved {rest}.")
