"""Videos as frames with their times, against the reference's video processor and model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from opsin.media.sampling import Video, VideoInfo

from .checkpoints import Case
from .conftest import Lab
from .ours import relative_error
from .pictures import picture
from .zoo import gemma_more


@pytest.fixture(params=gemma_more.CASES, ids=str)
def lab(request: pytest.FixtureRequest, labs: Callable[[Case], Lab]) -> Lab:
    """Both kinds of checkpoint."""
    pytest.importorskip("torchvision")
    return labs(request.param)


def clip() -> Video:
    """Three frames of a clip, one of them after a minute."""
    frames = np.stack([np.array(picture(50 + index, 90, 60)) for index in range(3)])
    info = VideoInfo(900, 10.0, 90.0, 90, 60)
    return Video(frames, (0.0, 30.0, 75.2), (0, 300, 752), info)


def test_frames_are_chosen_as_the_reference_chooses(lab: Lab) -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    family = lab.ours.model.family
    for count in (32, 100, 901):
        metadata = VideoMetadata(total_num_frames=count, fps=10.0)
        expected = default_sample_indices_fn(metadata, num_frames=32).tolist()
        choose = family.frame_chooser({})
        assert choose is not None
        assert list(choose(VideoInfo(count, 10.0, count / 10, 90, 60))) == expected
    fewer = family.frame_chooser({"fps": 1, "max_frames": 4})
    assert fewer is not None
    assert list(fewer(VideoInfo(100, 10.0, 10.0, 90, 60))) == [0, 25, 50, 75]


def test_a_video_beside_a_picture(lab: Lab) -> None:
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

    processor, family, config = lab.ours.processor, lab.ours.model.family, lab.case.config
    video = clip()
    image_item = family.prepare_image(picture(3, 60, 40), {})
    video_item = family.prepare_video(video, {})
    settings = lab.case.files["processor_config.json"]["image_processor"]
    kept = {name: settings[name] for name in ("patch_size", "pooling_kernel_size")}
    frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
    made = Gemma4VideoProcessor(**kept)(
        videos=[frames], do_sample_frames=False, return_tensors="pt"
    )
    theirs = made["pixel_values_videos"]
    ours = video_item.features["pixel_values"]
    assert float((ours - theirs[:, : ours.shape[1]]).abs().max()) <= 1 / 255

    placeholders = family.placeholders
    text = f"{placeholders['image']}See: {placeholders['video']}What happens?"
    prompt = processor.assemble(text, [image_item, video_item])
    assert " 00:30 <|image>" in prompt.text
    assert " 01:15 <|image>" in prompt.text
    ids = torch.tensor([prompt.token_ids])
    width, height = image_item.processed_size
    patch = settings["patch_size"]
    rows, columns = torch.arange(height // patch), torch.arange(width // patch)
    kinds = (ids == config["image_token_id"]) + 2 * (ids == config["video_token_id"])
    inputs = {
        "input_ids": ids,
        "pixel_values": image_item.features["pixel_values"][None],
        "image_position_ids": torch.cartesian_prod(rows, columns).flip(1)[None],
        "pixel_values_videos": theirs,
        "video_position_ids": made["video_position_ids"],
        "num_frames_per_video": made["num_frames_per_video"],
        "mm_token_type_ids": kinds,
    }
    video_item.features["pixel_values"] = theirs[:, : ours.shape[1]]
    assert relative_error(lab.ours.logits(prompt), lab.reference.logits(inputs)) < 1e-4
