"""The page itself: its parts, and what happens when they are used."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from opsin.errors import OpsinError
from opsin.ui.backends import Backend, Piece
from opsin.ui.turns import ENDINGS, Settings, Turn, kind_of, messages, shown

REDRAW = 0.08  # seconds between two drawings of a growing answer
EMPTY = """### Ask about a picture

Drop pictures, PDF files, videos or sounds below, or paste a picture, and write a question.

Try **Read the text.**, **What is the total?** or **Where is the red circle?**
"""
CSS = """
footer {display: none !important}
[aria-label="Share"], [title="Share"] {display: none !important}
.opsin-figures p {font-size: 0.8rem; opacity: 0.7; margin: 0}
.sidebar input {text-overflow: ellipsis; padding-right: 1.6rem !important}
#side .grid-wrap {max-height: none; height: auto; overflow: visible}
"""
# On a narrow screen the panel would hide the conversation: it starts folded there.
FOLD = """() => {
  if (window.innerWidth < 700) document.querySelector(".sidebar .toggle-button")?.click();
}"""
# There the drawn picture lies below the answer: it is brought into sight.
SHOW = """() => {
  const side = document.querySelector("#side");
  if (window.innerWidth < 700 && side?.checkVisibility())
    side.scrollIntoView({block: "nearest", behavior: "smooth"});
}"""
FONT = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # nothing is fetched
MONO = ["ui-monospace", "Consolas", "monospace"]


class Talk:
    """One visitor's conversation."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.places: list[int] = []  # the turn of each bubble
        self.stop = threading.Event()

    def bubbles(self) -> list[dict[str, Any]]:
        """The turns as the page shows them."""
        made, self.places = shown(self.turns)
        return made


class Page:
    """What the page's events do; each gets the visitor's own Talk and gives it back."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def ask(self, given: dict[str, Any], talk: Talk | None, *panel: Any) -> Iterator[Any]:
        """Answer what was typed and dropped."""
        talk = talk or Talk()
        text = (given.get("text") or "").strip()
        files = tuple(str(path) for path in given.get("files") or ())
        odd = [path for path in files if kind_of(path) is None]
        if odd:
            raise gr.Error("This file is no picture, PDF, video or sound.", title="Not sent")
        if not text and not files:
            raise gr.Error("Write a question, or drop a picture.", title="Nothing to send")
        talk.turns.append(Turn("user", text or "Describe this.", files))
        yield from self._answer(talk, panel)

    def again(self, talk: Talk | None, *panel: Any) -> Iterator[Any]:
        """Answer the last question anew."""
        talk = talk or Talk()
        while talk.turns and talk.turns[-1].role == "assistant":
            talk.turns.pop()
        if talk.turns:
            yield from self._answer(talk, panel)

    def edit(self, talk: Talk | None, *panel: Any, event: gr.EditData) -> Iterator[Any]:
        """Answer a question that was changed; what came after it is forgotten."""
        talk = talk or Talk()
        number = talk.places[int(event.index)] if talk.places else 0
        del talk.turns[number + 1 :]
        if talk.turns and talk.turns[-1].role == "user":
            talk.turns[-1].text = str(event.value)
            yield from self._answer(talk, panel)

    def stop(self, talk: Talk | None) -> None:
        """End the answer that is coming."""
        if talk is not None:
            talk.stop.set()

    def clear(self, talk: Talk | None) -> tuple[Any, ...]:
        """Begin anew."""
        if talk is not None:
            talk.stop.set()
        fresh = Talk()
        return fresh, fresh.bubbles(), "", gr.update(visible=False), []

    def load(self, model: str) -> str:
        """Load a model now."""
        try:
            self.backend.prepare(model)
        except OpsinError as error:
            raise gr.Error(error.line(), title="Not loaded") from None
        return self.backend.state(model)

    def _answer(self, talk: Talk, panel: tuple[Any, ...]) -> Iterator[Any]:
        """Show an answer as it comes.

        Each step gives Talk, bubbles, input box, figures, the side, its pictures, and the state of
        the model.
        """
        settings = _settings(panel)
        asked = messages(talk.turns, settings.system)
        turn = Turn("assistant")
        talk.turns.append(turn)
        talk.stop.clear()
        busy = gr.update(value=None, submit_btn=False, stop_btn=True)
        yield talk, talk.bubbles(), busy, "", gr.update(visible=False), [], gr.skip()
        last = Piece()
        drawn = 0.0
        try:
            pieces = self.backend.stream(asked, settings)
            for last in pieces:
                turn.text += last.text
                turn.reasoning += last.reasoning
                if talk.stop.is_set():
                    pieces.close()
                    turn.note = "stopped"
                    break
                if time.monotonic() - drawn > REDRAW:
                    drawn = time.monotonic()
                    yield talk, talk.bubbles(), *(gr.skip() for _ in range(5))
        except OpsinError as error:
            turn.note = error.line()
        if last.finish_reason == "length":
            turn.note = "cut off at the most tokens of an answer"
        free = gr.update(submit_btn=True, stop_btn=False)
        beside = gr.update(visible=bool(last.pictures))
        found = list(last.pictures)
        state = self.backend.state(settings.model)
        yield talk, talk.bubbles(), free, _figures(last), beside, found, state


def _settings(panel: tuple[Any, ...]) -> Settings:
    model, system, max_tokens, temperature, top_p, thinking = panel
    return Settings(
        str(model), system or "", int(max_tokens), float(temperature), float(top_p), bool(thinking)
    )


def _figures(piece: Piece) -> str:
    return " · ".join(line for line in piece.figures.splitlines() if line)


def build(backend: Backend, *, any_model: bool = True) -> gr.Blocks:
    """The page over a backend; `any_model` lets visitors type the name of one not listed."""
    page = Page(backend)
    names = backend.models()
    with gr.Blocks(title="Opsin", fill_height=True, analytics_enabled=False) as made:
        talk = gr.State(None)
        with gr.Sidebar(width=320):
            gr.Markdown("## Opsin")
            model = gr.Dropdown(
                names, value=names[0], label="Model", allow_custom_value=any_model, filterable=True
            )
            state = gr.Markdown(backend.state(names[0]))
            load = gr.Button("Load now", size="sm")
            fresh = gr.Button("New conversation", variant="primary", size="sm")
            system = gr.Textbox(label="System prompt", lines=2)
            with gr.Accordion("Answers", open=False):
                longest = gr.Slider(16, 8192, 1024, step=16, label="Most tokens")
                heat = gr.Slider(0, 2, 0, step=0.05, label="Temperature")
                mass = gr.Slider(0.05, 1, 1, step=0.05, label="Top p")
                thinking = gr.Checkbox(False, label="Think first, where the model can")
        with gr.Row(scale=1):
            with gr.Column(scale=3, min_width=340):
                chat = gr.Chatbot(
                    show_label=False,
                    placeholder=EMPTY,
                    editable="user",
                    buttons=["copy"],
                    height="calc(100vh - 210px)",
                    feedback_options=None,
                    allow_tags=False,
                    elem_id="chat",
                )
                box = gr.MultimodalTextbox(
                    show_label=False,
                    placeholder="Ask, or drop a file",
                    file_count="multiple",
                    file_types=ENDINGS,
                    sources=["upload", "microphone"],
                    autofocus=True,
                    elem_id="box",
                )
                figures = gr.Markdown("", elem_classes="opsin-figures")
            with gr.Column(scale=2, min_width=300, visible=False, elem_id="side") as side:
                found = gr.Gallery(
                    label="Found in the picture", columns=1, object_fit="contain", format="png"
                )
        panel: list[Any] = [model, system, longest, heat, mass, thinking]
        out: list[Any] = [talk, chat, box, figures, side, found, state]
        asked = box.submit(
            page.ask, [box, talk, *panel], out, api_name="ask", show_progress="hidden"
        )
        asked.then(None, js=SHOW)
        box.stop(page.stop, talk, queue=False, api_name=False)
        chat.retry(page.again, [talk, *panel], out, api_name=False, show_progress="hidden")
        _on_edit(chat, page, [talk, *panel], out)
        cleared: list[Any] = [talk, chat, figures, side, found]
        fresh.click(page.clear, talk, cleared, queue=False, api_name=False)
        chat.clear(page.clear, talk, cleared, queue=False, api_name=False)
        load.click(page.load, model, state, api_name=False)
        model.change(backend.state, model, state, queue=False, api_name=False)
        made.load(backend.state, model, state, queue=False, api_name=False)
        made.load(None, js=FOLD)
    made.queue(default_concurrency_limit=32)
    return made


def _on_edit(chat: gr.Chatbot, page: Page, inputs: list[Any], outputs: list[Any]) -> None:
    """Gradio finds an event's data by the annotation of a positional parameter."""

    def edited(event: gr.EditData, talk: Talk | None, *panel: Any) -> Iterator[Any]:
        yield from page.edit(talk, *panel, event=event)

    # The annotation is text here; Gradio looks for the class.
    edited.__annotations__["event"] = gr.EditData
    chat.edit(edited, inputs, outputs, api_name=False, show_progress="hidden")


def theme() -> gr.themes.Base:
    """Light or dark as the system is, in fonts that are there already."""
    return gr.themes.Soft(primary_hue="indigo", font=FONT, font_mono=MONO)
