"""The forms a transcript is written in, and who is asked how."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opsin import families
from opsin.errors import InputError, UnsupportedMedia
from opsin.media.limits import MediaLimits
from opsin.media.pauses import Piece
from opsin.prompt.template import ChatTemplate
from opsin.prompt.transcription import (
    Segment,
    asking,
    check_hears,
    clock,
    hearing_families,
    load_pieces,
    render,
)

SEGMENTS = [
    Segment(0.0, 1.5, " Hello there.\n\n1\n00:00:00,000 --> 00:00:09,000 "),
    Segment(1.5, 3.0, "  "),
    Segment(3.0, 3661.0414, "A < B & C"),
]


class Asked:
    """What is looked at of a processor."""

    def __init__(self, template: str, modalities: tuple[str, ...] = ("audio",)) -> None:
        self.chat_template = ChatTemplate.from_text(template)
        self.family = self
        self.modalities = modalities
        self.tokenizer = None


def test_subtitles_cannot_be_broken_by_words() -> None:
    srt = render(SEGMENTS, "srt")
    assert srt == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello there.\n1\n00:00:00,000 -> 00:00:09,000\n\n"
        "2\n00:00:03,000 --> 01:01:01,041\nA < B & C\n"
    )
    vtt = render(SEGMENTS, "vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHello there.\n")
    assert vtt.endswith("00:00:03.000 --> 01:01:01.041\nA &lt; B &amp; C\n")


def test_json_holds_the_words_and_verbose_json_the_times() -> None:
    words = [Segment(0, 1, " one "), Segment(1, 2.5, "two")]
    assert json.loads(render(words, "json")) == {"text": "one two"}
    held = json.loads(render(words, "verbose_json", "en"))
    assert (held["language"], held["duration"], held["text"]) == ("en", 2.5, "one two")
    assert held["segments"][1] == {"id": 1, "seek": 100, "start": 1, "end": 2.5, "text": "two"}
    assert render(words, "text") == "one two\n"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "00:00:00.000"), (59.9996, "00:01:00.000"), (36000, "10:00:00.000")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds, ".") == shown


def test_a_switch_in_the_template_is_used_and_words_otherwise() -> None:
    piece = Piece(np.ones(4, np.float32), 0, 1)
    messages, template = asking(Asked("{% if transcribe %}x{% endif %}"), piece, "en")
    assert template == {"chat_template_kwargs": {"transcribe": True, "language": "en"}}
    assert messages[0].text == ""
    messages, template = asking(Asked("plain"), piece, "en", "Ada Lovelace")
    assert template == {}
    assert "word for word" in messages[0].text
    assert "en" in messages[0].text
    assert "Ada Lovelace" in messages[0].text
    with pytest.raises(InputError, match="prompt cannot be used"):
        asking(Asked("{{ transcribe }}"), piece, "", "Ada")


def test_who_does_not_hear_is_told_who_does() -> None:
    check_hears(Asked("x"))
    with pytest.raises(UnsupportedMedia, match="takes text, image") as caught:
        check_hears(Asked("x", ("image",)))
    names = hearing_families()
    assert "voxtral" in names
    assert len({families.find(name) for name in names}) == len(names)
    assert all(name in caught.value.line() for name in hearing_families())


def test_silent_pieces_are_left_out_but_never_all() -> None:
    rate = 16_000
    sound = np.concatenate([np.ones(rate), np.zeros(4 * rate), np.ones(rate)]).astype(np.float32)
    pieces = load_pieces((sound, rate), MediaLimits(), 1.0)
    assert pieces[0].start == 0
    assert pieces[-1].end == 6
    assert not any(piece.is_silent for piece in pieces)
    assert len(load_pieces((np.zeros(3 * rate, np.float32), rate), MediaLimits(), 1.0)) == 1
