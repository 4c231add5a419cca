"""Transcriptions: forms in, requests out, and the refusal of a model that does not hear."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile

from opsin.errors import InputError
from opsin.server import audio
from opsin.server.multipart import FormPart, parse_form
from opsin.server.request import Delta
from opsin.types import Usage

from ..families.checkpoints import write_checkpoint
from ..families.zoo import voxtral
from .running import Running, serving

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


def test_a_form_says_what_is_asked() -> None:
    fields = [part("language", "de"), part("temperature", "0.5"), part("stream", "true")]
    fields.append(part("timestamp_granularities[]", "segment"))
    asked = audio.parse([part("file", "sound"), part("prompt", "names"), *fields], 99)
    assert (asked.sound, asked.language, asked.context) == (b"sound", "de", "names")
    assert (asked.sampling.temperature, asked.sampling.max_tokens, asked.stream) == (0.5, 99, True)


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([part("model", "x")], "file"),
        ([part("file", "s"), part("temperature", "hot")], "temperature"),
        ([part("file", "s"), part("response_format", "xml")], "response_format"),
        (
            [part("file", "s"), part("response_format", "srt"), part("stream", "1")],
            "response_format",
        ),
        (
            [part("file", "s"), part("timestamp_granularities[]", "word")],
            "timestamp_granularities[]",
        ),
        ([part("file", "s"), part("odd", "1")], "odd"),
    ],
)
def test_what_is_wrong_is_named(parts: list[FormPart], param: str) -> None:
    with pytest.raises(InputError) as caught:
        audio.parse(parts, 9)
    assert caught.value.param == param


def test_streamed_words_leave_in_the_order_of_the_pieces() -> None:
    renderer = audio.EventRenderer(3)
    counted = Usage(5, 2, 0, {"audio": 3})
    events = renderer.opening() + renderer.push(Delta(text=" a"))
    events += renderer.push(Delta(1, text="c", finish_reason="stop", usage=counted))
    assert [event["delta"] for event in events] == ["a"]
    events += renderer.push(Delta(text="b", finish_reason="stop", usage=counted))
    events += renderer.push(Delta(2, text=" d ", finish_reason="stop", usage=counted))
    assert "".join(event["delta"] for event in events).strip() == "ab c d"
    (done,) = renderer.closing()
    assert done["text"] == "ab c d"
    assert done["usage"]["input_token_details"]["audio_tokens"] == 9


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_checkpoint(voxtral.CASES[0], tmp_path_factory.mktemp("hearing") / "tiny")
    with serving(folder, max_tokens=6, memory=2**26) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def wav() -> bytes:
    """13 seconds of noise with a pause at the eighth."""
    samples = np.random.default_rng(0).normal(0, 0.1, 13 * 16_000).astype(np.float32)
    samples[int(7.7 * 16_000) : int(8.3 * 16_000)] = 0
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV")
    return buffer.getvalue()


def test_every_form_holds_the_same_words(hearing: Running, wav: bytes) -> None:
    def post(form: str) -> httpx.Response:
        fields = {"model": "default", "response_format": form}
        reply = hearing.client.post(
            "/v1/audio/transcriptions", data=fields, files={"file": ("a.wav", wav)}
        )
        assert reply.status_code == 200, reply.text
        return reply

    verbose = post("verbose_json").json()
    assert [(round(s["start"], 1), round(s["end"], 1)) for s in verbose["segments"]] == [
        (0.0, 8.0),
        (8.0, 13.0),
    ]
    assert verbose["duration"] == 13.0
    words = [segment["text"] for segment in verbose["segments"]]
    assert verbose["text"] == " ".join(words)
    assert verbose["usage"]["output_tokens"] <= 12
    srt = post("srt")
    assert srt.headers["content-type"].startswith("text/plain")
    assert "00:00:08," in srt.text
    assert post("vtt").text.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:0")
    whole = post("json").json()["text"]
    assert post("text").text == whole + "\n"
    client = openai.OpenAI(base_url=f"{hearing.url}/v1", api_key="unused", max_retries=0)
    asked = {"model": "default", "file": ("a.wav", wav)}
    assert client.audio.transcriptions.create(**asked).text == whole
    made = client.audio.transcriptions.create(**asked, response_format="verbose_json")
    assert made.segments is not None
    assert [segment.text for segment in made.segments] == words
    events = list(client.audio.transcriptions.create(**asked, stream=True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == whole


def test_the_command_line_writes_the_same(hearing: Running, wav: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav)
    folder = hearing.service.settings.model
    command = [sys.executable, "-m", "opsin", "transcribe", "-m", str(folder), "--max-tokens", "6"]
    out = tmp_path / "a.srt"
    done = subprocess.run(
        [*command, str(tmp_path / "a.wav"), "-o", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    fields = {"model": "default", "response_format": "srt"}
    reply = hearing.client.post(
        "/v1/audio/transcriptions", data=fields, files={"file": ("a.wav", wav)}
    )
    assert out.read_text(encoding="utf-8") == reply.text


def test_a_model_that_does_not_hear_says_what_it_takes(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.APIStatusError, match="takes text, image") as caught:
        client.audio.transcriptions.create(model="default", file=("a.wav", b"RIFF" * 10))
    assert caught.value.status_code == 415


def test_a_sound_that_cannot_be_read_is_refused(hearing: Running) -> None:
    client = openai.OpenAI(base_url=f"{hearing.url}/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.BadRequestError):
        client.audio.transcriptions.create(model="default", file=("a.wav", b"RIFF" * 10))
