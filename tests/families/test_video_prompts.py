"""Videos as the families that take them write them into a prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from opsin.engine.loop import Engine
from opsin.families.smolvlm import number_words
from opsin.media.sampling import Video, VideoInfo

from .checkpoints import Case
from .conftest import Lab
from .ours import answers, relative_error, tokens
from .pictures import picture
from .zoo import CASES

# What the reference's video processors choose of (frames, frames a second), recorded.
SMOLVLM_FRAMES = {
    (20, 5.0): [0, 6, 12, 19],
    (300, 10.0): [10, 50, 90, 130, 170, 210, 250, 290],
    (9, 3.0): [0, 4, 8],
}
INTERNVL_FRAMES = {
    (20, 5.0): [1, 3, 6, 8, 11, 13, 16, 18],
    (300, 10.0): [18, 56, 93, 131, 168, 206, 243, 281],
    (9, 3.0): [0, 1, 2, 3, 5, 6, 7, 8],
}
CHOICES = {"smolvlm-published_untied": SMOLVLM_FRAMES, "internvl-small": INTERNVL_FRAMES}


@pytest.fixture(params=CHOICES)
def lab(request: pytest.FixtureRequest, labs: Callable[[Case], Lab]) -> Lab:
    """A family that takes video."""
    return labs(next(case for case in CASES if case.name == request.param))


def clip(chosen: list[int], count: int, fps: float) -> Video:
    """The chosen frames of a clip of a few pictures."""
    frames = np.stack([np.array(picture(40 + index % 7, 90, 60)) for index in chosen])
    info = VideoInfo(count, fps, count / fps, 90, 60)
    return Video(frames, tuple(index / fps for index in chosen), tuple(chosen), info)


def test_the_reference_s_frames_are_chosen(lab: Lab) -> None:
    family = lab.ours.model.family
    for (count, fps), expected in CHOICES[lab.case.name].items():
        choose = family.frame_chooser({})
        assert choose is not None
        assert list(choose(VideoInfo(count, fps, count / fps, 90, 60))) == expected
    fewer = family.frame_chooser({"fps": 1, "max_frames": 2})
    assert fewer is not None
    assert len(fewer(VideoInfo(300, 10.0, 30.0, 90, 60))) == 2


def test_each_frame_is_told_in_the_family_s_words(lab: Lab) -> None:
    family = lab.ours.model.family
    text = family.prepare_video(clip([0, 330, 700], 710, 5.0), {}).text
    if lab.case.family == "internvl":
        one = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
        assert text == f"Frame1: {one}\nFrame2: {one}\nFrame3: {one}"
        return
    fake = "<fake_token_around_image>"
    one = f"{fake}<global-img>{'<image>' * 9}{fake}"
    assert text == (
        "You are provided the following series of three frames from a 0:02:22 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{one}\nFrame from 01:06:{one}\nFrame from 02:20:{one}\n\n"
    )


def test_a_video_s_logits_are_the_reference_s(lab: Lab) -> None:
    """Beside a picture, whose tokens are the same."""
    processor, family = lab.ours.processor, lab.ours.model.family
    picture_item = family.prepare_image(picture(3, 60, 40), {})
    video_item = family.prepare_video(clip([0, 3, 5], 6, 3.0), {})
    text = f"{family.placeholders['image']}See: {family.placeholders['video']}What happens?"
    prompt = processor.assemble(text, [picture_item, video_item])
    values = [item.value("pixel_values") for item in (picture_item, video_item)]
    stacked = torch.cat(values)
    inputs = {
        "input_ids": torch.tensor([prompt.token_ids]),
        "pixel_values": stacked[None] if lab.case.family == "smolvlm" else stacked,
    }
    assert relative_error(lab.ours.logits(prompt), lab.reference.logits(inputs)) < 1e-4


def test_a_video_is_prepared_from_a_request(lab: Lab) -> None:
    frames = [picture(50 + index, 64, 48) for index in range(6)]
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": frames},
                {"type": "text", "text": "What happens?"},
            ],
        }
    ]
    prompt = lab.ours.processor.prepare(messages)
    assert [item.kind for item in prompt.media] == ["video"]
    with lab.ours.engine() as engine:
        assert isinstance(engine, Engine)
        (events,) = answers(engine, [prompt], count=4)
    assert len(tokens(events)) == 4


def test_numbers_are_written_in_words() -> None:
    words = {0: "zero", 7: "seven", 13: "thirteen", 40: "forty", 64: "sixty-four"}
    words |= {100: "one hundred", 128: "one hundred and twenty-eight", 1000: "one thousand"}
    words |= {1005: "one thousand and five", 2345: "two thousand, three hundred and forty-five"}
    assert {number: number_words(number) for number in words} == words
