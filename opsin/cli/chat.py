"""`opsin chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import glob
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from opsin.cli.flags import (
    FPS,
    SAMPLING,
    ChatTemplate,
    Device,
    KVBits,
    KVGroupSize,
    MatFormerConfig,
    MatFormerSlice,
    MaxFrames,
    MaxKVSize,
    MinP,
    Model,
    Quant,
    QuantizedKVStart,
    RepackedCache,
    RepetitionPenalty,
    Revision,
    Speculative,
    Temperature,
    TopK,
    TopP,
    UseAudioInVideo,
    json_option,
    load_with_progress,
    note_window,
)
from opsin.errors import OpsinError

if TYPE_CHECKING:
    from rich.console import Console

    from opsin.api import GenerationResult
    from opsin.cli.chat_session import Attached, Commands, Session
    from opsin.types import Message

PROMPT = "> "
HISTORY_LINES = 1000
LARGEST_PREVIEWED = 4  # pictures of one message


@contextmanager
def heard_interrupts() -> Iterator[list[int]]:
    """A list that is filled by Ctrl-C, which raises KeyboardInterrupt as ever.

    Python drops an exception that is raised while an object is being finalised, and drawing
    finalises many: without the list a Ctrl-C would now and then do nothing.
    """
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


def command(
    model: Model = "bundled",
    image: Annotated[
        list[str] | None, typer.Option(help="Show it a picture or PDF first. Repeatable.")
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option(help="Let it hear a sound first. Repeatable.")
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option(help="Show it a video first. Repeatable.")
    ] = None,
    fps: FPS = None,
    max_frames: MaxFrames = None,
    use_audio_in_video: UseAudioInVideo = False,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="Variables for the chat template, as JSON.")
    ] = None,
    enable_thinking: Annotated[
        bool | None,
        typer.Option("--enable-thinking/--no-thinking", help="Let a thinking model think first."),
    ] = None,
    processor_kwargs: Annotated[
        str | None, typer.Option(help="The family's picture options, as JSON.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer.", rich_help_panel=SAMPLING)
    ] = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Repeat sampled answers.", rich_help_panel=SAMPLING)
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", rich_help_panel="Engine"),
    ] = None,
    quant: Quant = None,
    repacked_cache: RepackedCache = None,
    kv_bits: KVBits = None,
    kv_group_size: KVGroupSize = 64,
    quantized_kv_start: QuantizedKVStart = 5000,
    max_kv_size: MaxKVSize = None,
    speculative: Speculative = None,
    revision: Revision = None,
    matformer_config: MatFormerConfig = None,
    matformer_slice: MatFormerSlice = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print tokens/s and times after each answer.")
    ] = False,
) -> None:
    """Talk with a model; /help lists what else can be typed."""
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "fps": fps,
        "max_frames": max_frames,
        "use_audio_in_video": use_audio_in_video,
        "enable_thinking": enable_thinking,
        "kv_bits": kv_bits,
        "kv_group_size": kv_group_size,
        "quantized_kv_start": quantized_kv_start,
        "max_kv_size": max_kv_size,
        "speculative": speculative,
        "processor_kwargs": json_option("--processor-kwargs", processor_kwargs),
        "chat_template_kwargs": json_option("--chat-template-kwargs", chat_template_kwargs),
    }
    given = {name: value for name, value in sampling.items() if value is not None}
    from opsin.cli.chat_session import Session

    loaded, processor = load_with_progress(
        model,
        device=device,
        dtype=dtype,
        quantize=quant,
        repacked_cache=repacked_cache,
        revision=revision,
        chat_template=chat_template,
        matformer_config=matformer_config,
        matformer_slice=matformer_slice,
    )
    note_window(max_kv_size)
    from opsin.api import stream_generate

    family = processor.family
    session = Session(family.takes, family.sampling_rate, system)
    chat = Chat(session, lambda messages: stream_generate(loaded, processor, messages, **given))
    first = (("image", image), ("audio", audio), ("video", video))
    for kind, paths in first:
        for path in paths or ():
            chat.shown(session.attach(kind, path))
    chat.verbose = verbose
    chat.run()
    if chat.commands.refused and not sys.stdin.isatty():
        raise typer.Exit(1)


class Chat:
    """The loop: a line in, an answer out, until the end of input.

    Where answers go on to a file, they alone do: all else that is said goes to stderr.
    """

    def __init__(self, session: Session, generate: Callable[[list[Message]], Any]) -> None:
        from rich.console import Console

        from opsin.cli.chat_session import Commands

        self.session = session
        self.generate = generate
        self.verbose = False
        self.console: Console = Console(highlight=False)
        on_terminal = self.console.is_terminal
        self.aside = self.console if on_terminal else Console(highlight=False, stderr=True)
        self.commands: Commands = Commands(session, self.say, self.tell, self.shown)

    def run(self) -> None:
        """Read lines until /exit or the end of input."""
        keep = self._history()
        if sys.stdin.isatty():
            self.say("Ask something; /image FILE shows a picture, /help lists all, Ctrl-D leaves.")
        try:
            while (line := self._line()) is not None:
                if not self._take(line):
                    break
        finally:
            keep()

    def say(self, line: str) -> None:
        """A line that is not the model's."""
        self.aside.print(line, style="dim", markup=False, soft_wrap=True)

    def tell(self, line: str) -> None:
        """A line that was asked for."""
        self.console.print(line, style="dim", markup=False, soft_wrap=True)

    def shown(self, attached: Attached) -> None:
        """Preview pictures where the terminal can."""
        from opsin.cli.chat_screen import preview, preview_protocol

        protocol = preview_protocol() if self.console.is_terminal else None
        if protocol is None:
            return
        for picture in attached.pictures[:LARGEST_PREVIEWED]:
            self.console.file.write(preview(picture, protocol).decode("latin-1"))
        self.console.file.flush()

    def _line(self) -> str | None:
        """The next line, or several joined by backslashes; None at the end of input."""
        parts: list[str] = []
        while True:
            try:
                part = input(PROMPT if sys.stdin.isatty() and not parts else "")
            except EOFError:
                if sys.stdin.isatty():
                    self.console.print()
                return "\n".join(parts) if parts else None
            except KeyboardInterrupt:
                self.console.print()
                self.say("Ctrl-D or /exit leaves.")
                parts = []
                continue
            if not part.endswith("\\"):
                return "\n".join([*parts, part])
            parts.append(part[:-1])

    def _take(self, line: str) -> bool:
        """Do what a line asks for; False to leave."""
        from opsin.cli.chat_session import COMMANDS, split_pasted

        word = line.strip().split(" ")[0]
        if not line.strip():
            return True
        # A path may stand first in a line too.
        if word in COMMANDS or (word.startswith("/") and not Path(word).exists()):
            return self.commands.run(line)
        found, question = split_pasted(line)
        if found and not self.commands.attach_all(found):
            return True
        if question.strip():
            self._answer(question.strip())
        return True

    def _answer(self, question: str) -> None:
        from opsin.api import figures
        from opsin.cli.chat_screen import Answer

        messages = self.session.ask(question)
        answer = Answer(self.console, self.aside, folds=sys.stdin.isatty())
        last: GenerationResult | None = None
        stream: Generator[GenerationResult] | None = None
        try:
            stream = cast("Generator[GenerationResult]", self.generate(messages))
            with heard_interrupts() as heard:
                for last in stream:
                    if last.reasoning:
                        answer.think(last.reasoning)
                    if last.text:
                        answer.push(last.text)
                    if heard:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            last = None
        except OpsinError as error:
            answer.close()
            self.session.failed()
            self.commands.refuse(error.line())
            return
        finally:
            if stream is not None:
                stream.close()
        answer.close()
        self.session.thoughts = answer.thoughts.strip()
        if answer.text:
            self.session.answered(answer.text)
        else:
            self.session.failed()  # no template takes an empty answer
        if last is None:
            self.say("(stopped)")
        elif last.finish_reason == "length":
            self.say("(cut off at --max-tokens)")
        if self.verbose and last is not None:
            self.say(figures(last))

    def _history(self) -> Callable[[], None]:
        """Line editing with the lines of earlier chats; the function that keeps today's."""
        if not sys.stdin.isatty():
            return lambda: None
        try:
            import readline
        except ImportError:  # Windows
            return lambda: None
        from opsin.config import settings

        file = settings().cache / "chat_history"
        with suppress(OSError):
            readline.read_history_file(file)
        readline.set_history_length(HISTORY_LINES)
        readline.set_completer_delims(" ")
        readline.set_completer(_complete)
        readline.parse_and_bind("tab: complete")

        def keep() -> None:
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(file)

        return keep


def _complete(text: str, state: int) -> str | None:
    """Commands and paths that begin as the word does."""
    from opsin.cli.chat_session import COMMANDS

    names = [name for name in COMMANDS if name.startswith(text)] if text.startswith("/") else []
    pattern = glob.escape(str(Path(text).expanduser())) if text else ""
    paths = glob.glob(pattern + "*")  # noqa: PTH207  the word is the start of a name
    options = [*names, *(p + "/" if Path(p).is_dir() else p for p in sorted(paths))]
    return options[state] if state < len(options) else None
