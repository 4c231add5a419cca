"""Transcriptions: forms in, requests out, and the refusal of a model that does not hear."""

from __future__ import annotations

import openai
import pytest

from opsin.errors import InputError
from opsin.server import audio
from opsin.server.multipart import FormPart, parse_form
from opsin.server.request import Answer, Delta, Head
from opsin.types import Usage

from .running import Running

FORM = (
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\n\r\n--x\r\nRIFF\x00\xff\r\n\r\n--B\r\n"
    b'content-disposition: form-data; name="model"\r\n\r\ntiny\r\n--B--\r\n'
)
KIND = "multipart/form-data; boundary=B"


def test_a_form_keeps_every_byte() -> None:
    file, model = parse_form(KIND, FORM)
    assert file == FormPart("file", b"\r\n--x\r\nRIFF\x00\xff\r\n", "a.wav")
    assert (model.name, model.text, model.filename) == ("model", "tiny", None)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", FORM),
        (KIND, b""),
        (KIND, FORM[:-10]),
        (KIND, b"--B\r\nno name\r\n\r\nx\r\n--B--"),
        (KIND, b"--B\r\n" * 100 + b"--B--"),
    ],
)
def test_what_is_no_form_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(InputError):
        parse_form(kind, body)


def part(name: str, text: str) -> FormPart:
    return FormPart(name, text.encode())


def test_a_form_becomes_a_request() -> None:
    fields = [part("language", "de"), part("temperature", "0.5"), part("stream", "true")]
    asked = audio.parse([part("file", "sound"), part("prompt", "names"), *fields], 99)
    (message,) = asked.request.messages
    assert message.media[0].source == b"sound"
    assert "de" in message.text
    assert "names" in message.text
    assert (asked.request.sampling.temperature, asked.request.stream) == (0.5, True)


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([part("model", "x")], "file"),
        ([part("file", "s"), part("temperature", "hot")], "temperature"),
        ([part("file", "s"), part("response_format", "srt")], "response_format"),
        ([part("file", "s"), part("odd", "1")], "odd"),
    ],
)
def test_what_is_wrong_is_named(parts: list[FormPart], param: str) -> None:
    with pytest.raises(InputError) as caught:
        audio.parse(parts, 9)
    assert caught.value.param == param


def test_a_stream_of_words_and_their_sum() -> None:
    renderer = audio.EventRenderer(Head("", 0, "m"))
    events = renderer.opening() + renderer.push(Delta(text=" a"))
    events += renderer.push(
        Delta(text="b", finish_reason="stop", usage=Usage(5, 2, 0, {"audio": 3}))
    )
    events += renderer.closing()
    assert [event.get("delta", event.get("text")) for event in events] == [" a", "b", "ab"]
    held = Answer(" ab", finish_reason="stop", usage=Usage(5, 2, 0, {"audio": 3}))
    assert audio.render(held)["text"] == "ab"
    assert audio.render(held)["usage"]["input_token_details"]["audio_tokens"] == 3


def test_a_model_that_does_not_hear_says_what_it_takes(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="takes text, image"):
        client.audio.transcriptions.create(model="default", file=("a.wav", b"RIFF" * 10))
