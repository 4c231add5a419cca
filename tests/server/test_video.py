"""Videos in requests: every form there is, how they are sampled, and models that take pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import av
import openai
import pytest
from PIL import Image

import opsin
from opsin.errors import InputError, UnsupportedMedia
from opsin.media.video import load_video

from ..families.checkpoints import write_checkpoint
from ..families.zoo import florence, gemma_more, llava
from ..media.samples import clip, encoded_sound, tone
from .running import Running, serving

CLIP = clip(60, size=(64, 48), rate=10)
URL = "data:video/mp4;base64," + base64.b64encode(CLIP).decode()
TEXT = {"type": "text", "text": "What happens?"}
VIDEO = {"type": "video_url", "video_url": {"url": URL}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a family that takes pictures, and no video."""
    return write_checkpoint(llava.CASES[0], tmp_path_factory.mktemp("video") / "tiny-llava")


@pytest.fixture(scope="module")
def pictures_only(folder: Path) -> Iterator[Running]:
    with serving(folder) as running:
        yield running.ready()


def ask(server: Running, *parts: dict[str, Any], **fields: Any) -> Any:
    message = {"role": "user", "content": [*parts, TEXT]}
    return server.chat(messages=[message], max_tokens=4, **fields)


def told(reply: Any) -> tuple[Any, Any, Any]:
    body = reply.json()
    assert reply.status_code == 200, body
    said = body["choices"][0]["message"]["content"]
    return said, body["usage"]["prompt_tokens"], body["video_frames"]


def test_every_form_of_a_video_is_read(server: Running, media_root: Path) -> None:
    (media_root / "clip.mp4").write_bytes(CLIP)
    expected = told(ask(server, VIDEO))
    assert expected[2][0] > 2
    for part in (
        {"type": "video_url", "video_url": {"url": f"file://{media_root / 'clip.mp4'}"}},
        {"type": "video_url", "video_url": {"url": "clip.mp4"}},
        {"type": "video_url", "video_url": URL},
        {"type": "video", "video": "clip.mp4"},
        {"type": "input_video", "input_video": URL},
    ):
        assert told(ask(server, part)) == expected


def test_the_request_and_the_part_say_how_many_frames(server: Running) -> None:
    assert told(ask(server, VIDEO, video_max_frames=4))[2] == [4]
    own = {**VIDEO, "max_frames": 6}
    assert told(ask(server, own, VIDEO, video_max_frames=4))[2] == [6, 4]
    slow, fast = (told(ask(server, VIDEO, video_fps=fps))[2][0] for fps in (1, 4))
    assert slow < fast
    refused = ask(server, VIDEO, video_fps=-1)
    assert refused.status_code == 400
    assert "video_fps" in refused.json()["error"]["param"]


def test_responses_state_the_frames(pictures_only: Running) -> None:
    client = openai.OpenAI(base_url=pictures_only.url + "/v1", api_key="none", max_retries=0)
    parts = [{"type": "input_video", "input_video": URL}, {"type": "input_text", "text": "What?"}]
    asked: Any = {"model": "default", "input": [{"role": "user", "content": parts}]}
    for extra, frames in (({}, [8]), ({"video_max_frames": 3}, [3])):
        whole = client.responses.create(**asked, max_output_tokens=3, extra_body=extra)
        assert whole.to_dict()["video_frames"] == frames
        events = client.responses.create(
            **asked, max_output_tokens=3, extra_body=extra, stream=True
        )
        last = [event.to_dict() for event in events][-1]
        assert last["response"]["video_frames"] == frames
    plain = client.responses.create(model="default", input="hi", max_output_tokens=3)
    assert "video_frames" not in plain.to_dict()


def test_messages_state_the_frames(pictures_only: Running) -> None:
    client = anthropic.Anthropic(base_url=pictures_only.url, api_key="none", max_retries=0)
    source = {"type": "base64", "media_type": "video/mp4", "data": URL.partition(",")[2]}
    block: dict[str, Any] = {"type": "video", "source": source}

    def create(block: dict[str, Any], **more: Any) -> Any:
        messages: Any = [{"role": "user", "content": [block, TEXT]}]
        return client.messages.create(model="default", max_tokens=3, messages=messages, **more)

    assert create(block).to_dict()["video_frames"] == [8]
    asked = {"video_max_frames": 3}
    assert create(block, extra_body=asked).to_dict()["video_frames"] == [3]
    assert create({**block, "max_frames": 2}, extra_body=asked).to_dict()["video_frames"] == [2]
    events = create(block, stream=True)
    (last,) = [event.to_dict() for event in events if event.type == "message_delta"]
    assert last["video_frames"] == [8]
    with pytest.raises(anthropic.BadRequestError, match="document or video"):
        create({"type": "video", "source": {"type": "file", "file_id": "x"}})


def test_a_model_of_pictures_gets_frames_as_pictures(pictures_only: Running) -> None:
    reply = ask(pictures_only, VIDEO, video_max_frames=3)
    said, tokens, frames = told(reply)
    assert frames == [3]
    assert [(image["width"], image["height"]) for image in reply.json()["images"]] == [(64, 48)] * 3
    parts = []
    for frame in load_video(CLIP, max_frames=3).frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    same = ask(pictures_only, *parts).json()
    assert same["choices"][0]["message"]["content"] == said
    assert same["usage"]["prompt_tokens"] == tokens
    assert "video_frames" not in same
    assert told(ask(pictures_only, VIDEO))[2] == [8]
    streamed = ask(pictures_only, VIDEO, stream=True)
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert [json.loads(x)["video_frames"] for x in lines if "video_frames" in x] == [[8]]


@pytest.mark.parametrize(
    "data",
    [b"", CLIP[:200], b"\0" * 4096, encoded_sound(tone(0.2), 44_100, "mp4", "aac")],
    ids=["empty", "cut", "zeros", "sound alone"],
)
def test_what_is_no_video_is_a_refusal(data: bytes, pictures_only: Running) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    reply = ask(pictures_only, {"type": "video_url", "video_url": {"url": url}})
    assert reply.status_code in (400, 415), reply.text
    assert "Traceback" not in reply.text


def test_python_takes_the_same_and_says_how_many(folder: Path) -> None:
    model, processor = opsin.load(str(folder), device="cpu")
    frames = [Image.fromarray(frame) for frame in load_video(CLIP, max_frames=3).frames]
    asked: dict[str, Any] = {"max_tokens": 4}
    result = opsin.generate(model, processor, "What?", video=CLIP, max_frames=3, **asked)
    same = opsin.generate(model, processor, "What?", image=frames, **asked)
    assert (result.tokens, result.video_frames) == (same.tokens, (3,))
    assert result.image_sizes == same.image_sizes
    part = {"type": "video", "video": CLIP, "max_frames": 2}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    two = opsin.generate(model, processor, messages, max_frames=3, **asked)
    assert two.video_frames == (2,)
    rate = opsin.generate(model, processor, "What?", video=CLIP, fps=1, **asked)
    assert rate.video_frames == (6,)
    for name, value in (("fps", 0), ("fps", "two"), ("max_frames", 0), ("max_frames", 2.5)):
        with pytest.raises(InputError, match=name):
            opsin.generate(model, processor, "What?", video=CLIP, **{name: value})


def test_a_model_of_one_picture_refuses_a_video(tmp_path: Path) -> None:
    model, processor = opsin.load(str(write_checkpoint(florence.CASES[0], tmp_path / "one")))
    with pytest.raises(UnsupportedMedia, match="does not take video"):
        opsin.generate(model, processor, "What?", video=CLIP)


def with_sound() -> bytes:
    """The clip with a second of a tone."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(CLIP)) as seen, av.open(buffer, "w", format="mp4") as out:
        pictures = out.add_stream_from_template(seen.streams.video[0])
        sound = out.add_stream("aac", rate=44_100, layout="mono")
        for packet in seen.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                out.mux(packet)
        frame = av.AudioFrame.from_ndarray(tone(1.0, channels=1).T.copy(), "fltp", "mono")
        frame.sample_rate = 44_100
        out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return buffer.getvalue()


def test_a_model_that_hears_is_given_the_sound_of_a_video(tmp_path: Path) -> None:
    case = gemma_more.CASES[0]
    model, processor = opsin.load(str(write_checkpoint(case, tmp_path / "hears")))
    movie = with_sound()
    asked: dict[str, Any] = {"max_tokens": 3, "max_frames": 2}
    apart = opsin.generate(model, processor, "What?", video=CLIP, audio=movie, **asked)
    both = opsin.generate(model, processor, "What?", video=movie, use_audio_in_video=True, **asked)
    silent = opsin.generate(model, processor, "What?", video=movie, **asked)
    assert both.tokens == apart.tokens
    assert both.prompt_tokens == apart.prompt_tokens > silent.prompt_tokens
    text = {"type": "text", "text": "What?"}
    part = {"type": "video", "video": movie, "use_audio_in_video": True}
    two = [{"type": "video", "video": CLIP}, {"type": "audio", "audio": movie}]
    one, other = (
        opsin.generate(model, processor, [{"role": "user", "content": content}], **asked)
        for content in ([part, text], [*two, text])
    )
    assert one.tokens == other.tokens
    assert one.prompt_tokens == other.prompt_tokens
    with pytest.raises(UnsupportedMedia, match="has no sound"):
        opsin.generate(model, processor, "What?", video=CLIP, use_audio_in_video=True)


def test_a_model_that_does_not_hear_says_so(pictures_only: Running, folder: Path) -> None:
    for fields, part in (({"use_audio_in_video": True}, {}), ({}, {"use_audio_in_video": True})):
        refused = ask(pictures_only, {**VIDEO, **part}, **fields)
        assert refused.status_code == 400
        assert "does not hear" in refused.json()["error"]["message"]
    assert told(ask(pictures_only, {**VIDEO, "use_audio_in_video": False}))[2] == [8]
    model, processor = opsin.load(str(folder), device="cpu")
    with pytest.raises(UnsupportedMedia, match="does not take audio"):
        opsin.generate(model, processor, "What?", video=CLIP, use_audio_in_video=True)
