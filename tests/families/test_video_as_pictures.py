"""Videos of families whose chat template knows pictures only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from opsin.errors import InputError
from opsin.media.sampling import VideoInfo

from .checkpoints import Case
from .conftest import Lab
from .ours import relative_error
from .pictures import picture, sound
from .zoo import gemma3n

FRAMES = [picture(50 + index, 90, 60) for index in range(3)]
VIDEO = {"type": "video", "video": FRAMES, "fps": 1.0}
SOUND = sound(5, 0.8)


@pytest.fixture
def lab(labs: Callable[[Case], Lab]) -> Lab:
    return labs(gemma3n.CASES[0])


def user(*parts: Any) -> list[dict[str, Any]]:
    """One message of these parts."""
    return [{"role": "user", "content": list(parts)}]


def image(source: Any) -> dict[str, Any]:
    """A picture's part."""
    return {"type": "image", "image": source}


def test_a_video_is_its_frames_as_pictures(lab: Lab) -> None:
    words = {"type": "text", "text": "What happens?"}
    before, after = image(picture(3, 40, 40)), {"type": "audio", "audio": SOUND}
    video = lab.ours.processor.prepare(user(before, VIDEO, words, after))
    pictures = lab.ours.processor.prepare(user(before, *map(image, FRAMES), words, after))
    assert video.token_ids == pictures.token_ids
    assert [item.kind for item in video.media] == ["image", "video", "audio"]
    assert len(video.media[1].indices) == 3 * len(video.media[0].indices)
    assert relative_error(lab.ours.logits(video), lab.ours.logits(pictures)) < 1e-3


def test_a_video_beside_the_prompt_comes_after_the_pictures(lab: Lab) -> None:
    prepare = lab.ours.processor.prepare
    beside = prepare("And?", images=[picture(3, 40, 40)], videos=[FRAMES], fps=1.0)
    within = prepare(user(image(picture(3, 40, 40)), VIDEO, {"type": "text", "text": "And?"}))
    assert [item.kind for item in beside.media] == ["image", "video"]
    assert beside.token_ids == within.token_ids


def test_a_place_that_no_medium_fills_is_refused(lab: Lab) -> None:
    text = "<bos><image_soft_token><image_soft_token>"
    with pytest.raises(InputError, match="2 images but 1 came"):
        lab.ours.processor.prepare(text, videos=[FRAMES])


def test_frames_are_a_second_apart_unless_asked_otherwise(lab: Lab) -> None:
    family = lab.ours.processor.family
    info = VideoInfo(100, 10.0, 10.0, 90, 60)
    for options, count in (({}, 10), ({"fps": 0.4}, 4), ({"max_frames": 3}, 3)):
        choose = family.frame_chooser(options)
        assert choose is not None
        assert len(choose(info)) == count
