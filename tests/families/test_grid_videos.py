"""Videos as grids of patches (the Qwen-VL line, ERNIE) against the reference's processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from opsin.checkpoint.config import read_processor_config
from opsin.errors import MediaError
from opsin.families.base import Prompt
from opsin.families.frame_times import clock, with_times
from opsin.media.sampling import Video, VideoInfo
from opsin.types import Media

from .checkpoints import Case
from .conftest import Lab
from .oracle import read_json
from .ours import answers, relative_error, tokens
from .pictures import picture
from .scenes import IMAGE, text, user
from .zoo import each, ernie, qwen, qwen_more

CASES = (*qwen.CASES, *qwen_more.CASES, *ernie.CASES)
VIDEO = {"type": "video"}
SETTINGS = ("patch_size", "merge_size", "image_mean", "image_std", "size")


@pytest.fixture(params=each(CASES), ids=str)
def lab(request: pytest.FixtureRequest, labs: Callable[[Case], Lab]) -> Lab:
    """Every checkpoint of these families."""
    pytest.importorskip("torchvision")
    return labs(request.param)


def clip(seed: int, count: int, size: tuple[int, int], every: int = 6) -> Video:
    """`count` frames, each `every`-th of a video of 10 frames a second."""
    frames = np.stack([np.array(picture(seed + index, *size)) for index in range(count)])
    indices = tuple(range(0, count * every, every))
    total = count * every + 2
    info = VideoInfo(total, 10.0, total / 10, *size)
    return Video(frames, tuple(index / 10 for index in indices), indices, info)


@dataclass
class Story:
    """A request with videos and pictures, in order of their places in `parts`."""

    parts: Sequence[dict[str, Any]]
    media: Sequence[Video | Image.Image]

    def prompt(self, lab: Lab) -> Prompt:
        """The prompt as Opsin makes it of decoded media."""
        processor, family = lab.ours.processor, lab.ours.model.family
        held = [Media("image" if part is IMAGE else "video", "x") for part in self.parts]
        messages = [user(*self.parts, text("What happens?"))]
        rendered = processor._render(messages, held, (), {})
        ready = [
            family.prepare_video(item, {})
            if isinstance(item, Video)
            else family.prepare_image(item, {})
            for item in self.media
        ]
        return processor.assemble(rendered, ready)

    def reference(self, lab: Lab, font: Path) -> dict[str, Any]:
        """The inputs as the reference's processors make them."""
        from transformers.video_utils import VideoMetadata

        processor = lab.reference.processor
        before = processor.video_processor
        processor.video_processor = video_processor(lab, font)
        videos = [item for item in self.media if isinstance(item, Video)]
        pictures = [item for item in self.media if not isinstance(item, Video)]
        messages = [user(*self.parts, text("What happens?"))]
        rendered = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        try:
            made = processor(
                text=[rendered],
                images=pictures or None,
                videos=[video.frames.copy() for video in videos],
                video_metadata=[
                    VideoMetadata(
                        total_num_frames=video.info.num_frames,
                        fps=video.info.fps,
                        frames_indices=list(video.indices),
                    )
                    for video in videos
                ],
                do_sample_frames=False,
                return_tensors="pt",
            )
        finally:
            processor.video_processor = before
        return dict(made)


def video_processor(lab: Lab, font: Path, **changes: Any) -> Any:
    """The reference's video processor of a case."""
    from transformers.models.ernie4_5_vl_moe import video_processing_ernie4_5_vl_moe
    from transformers.models.qwen2_vl import video_processing_qwen2_vl
    from transformers.models.qwen3_vl import video_processing_qwen3_vl

    stated = read_json(lab.folder, "preprocessor_config.json")
    settings = {name: stated[name] for name in SETTINGS if name in stated} | changes
    family = lab.case.family
    if family.startswith("ernie"):
        return video_processing_ernie4_5_vl_moe.Ernie4_5_VLMoeVideoProcessor(
            **settings, font=str(font)
        )
    if family.startswith("qwen3"):
        return video_processing_qwen3_vl.Qwen3VLVideoProcessor(**settings)
    if "size" not in settings:
        settings |= {name: stated[name] for name in ("min_pixels", "max_pixels")}
    return video_processing_qwen2_vl.Qwen2VLVideoProcessor(**settings)


@pytest.fixture(scope="session")
def font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pillow's own font as a file."""
    path = tmp_path_factory.mktemp("font") / "Roboto-Regular.ttf"
    path.write_bytes(ImageFont.load_default(12).font_bytes)
    return path


ONE = Story((VIDEO,), (clip(60, 5, (90, 70)),))
SEVERAL = Story(
    (VIDEO, text("then"), IMAGE, VIDEO, IMAGE),
    (clip(70, 4, (64, 100), 25), picture(3, 60, 90), clip(80, 3, (120, 40)), picture(4, 50, 50)),
)


def check(lab: Lab, story: Story, font: Path) -> tuple[Prompt, list[int]]:
    """Ids, pixels, positions and logits are the reference's; its greedy tokens."""
    family = lab.ours.model.family
    with_font = {**read_json(lab.folder, "preprocessor_config.json"), "font_file": str(font)}
    with pytest.MonkeyPatch.context() as patched:
        settings = {**family.processor_config, "video_processor": with_font}
        if lab.case.family.startswith("ernie"):
            patched.setattr(family, "processor_config", settings)
        ours = story.prompt(lab)
    theirs = story.reference(lab, font)
    assert ours.token_ids == theirs["input_ids"][0].tolist()
    videos = [item for item in ours.media if item.kind == "video"]
    expected = theirs["pixel_values_videos"]
    got = torch.cat([item.features["pixel_values"] for item in videos])
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 1 / 255
    grids = torch.stack([item.features["grid"] for item in videos])
    assert grids.tolist() == theirs["video_grid_thw"].tolist()
    model = lab.reference.model
    accepted = lab.reference._accepted(theirs)
    positions, delta = model.model.get_rope_index(
        theirs["input_ids"],
        **{
            name: theirs[name]
            for name in (
                "mm_token_type_ids",
                "image_grid_thw",
                "video_grid_thw",
                "second_per_grid_ts",
            )
            if name in theirs
        },
    )
    assert ours.positions.tolist() == positions[:, 0].tolist()
    assert ours.next_position == len(ours.token_ids) + int(delta)
    assert relative_error(lab.ours.logits(ours), lab.reference.logits(accepted)) < 1e-4
    return ours, lab.reference.greedy(accepted)


def test_videos_are_the_reference_s(lab: Lab, font: Path) -> None:
    one, first = check(lab, ONE, font)
    several, second = check(lab, SEVERAL, font)
    words = lab.ours.prompt(lab.scenes["one"])
    with lab.ours.engine(step=19) as engine:
        batch = answers(engine, [one, words, several])
    assert [tokens(events) for events in batch] == [first, lab.reference_greedy("one"), second]


def test_frames_are_as_large_as_the_reference_s(lab: Lab, font: Path) -> None:
    """Limits of a frame or of the clip, from the checkpoint or capped to what a frame may cost."""
    family = lab.ours.model.family
    video = video_processor(lab, font)
    capped = {"cap_pixels_per_frame": True}
    takes_cap = not lab.case.family.startswith("ernie")
    for count, width, height in (
        (2, 300, 200),
        (5, 33, 20),
        (7, 640, 48),
        (24, 90, 70),
        (31, 20, 400),
    ):
        frames = torch.zeros(count, 3, height, width, dtype=torch.uint8)
        for options in ({}, capped) if takes_cap else ({},):
            made = video(
                videos=[frames],
                do_sample_frames=False,
                return_tensors="pt",
                **(options or ({"cap_pixels_per_frame": False} if takes_cap else {})),
                **({} if takes_cap else {"draw_on_frames": False}),
            )
            rows, columns = made["video_grid_thw"][0, 1:].tolist()
            patch = family.vision["patch_size"]
            assert family.frame_size(frames, options) == (columns * patch, rows * patch)


def test_frames_are_chosen_as_the_reference_chooses(lab: Lab, font: Path) -> None:
    from transformers.video_utils import VideoMetadata

    family, video = lab.ours.model.family, video_processor(lab, font)
    for count, fps, rate in ((40, 10.0, 2), (300, 29.97, 2), (90, 30.0, 4), (1000, 25.0, 1)):
        metadata = VideoMetadata(total_num_frames=count, fps=fps)
        expected = video.sample_frames(metadata, fps=rate, temporal_patch_size=2)
        choose = family.frame_chooser({"fps": rate})
        assert list(choose(VideoInfo(count, fps, count / fps, 90, 60))) == expected.tolist()
    for count in (1, 2, 3):
        few = family.frame_chooser({})(VideoInfo(count, 10.0, count / 10, 90, 60))
        assert few
        assert max(few) < count
    assert len(family.frame_chooser({"max_frames": 4})(VideoInfo(900, 10.0, 90.0, 90, 60))) == 4


def test_a_single_frame_and_a_narrow_video(lab: Lab) -> None:
    family = lab.ours.model.family
    item = family.prepare_video(clip(3, 1, (40, 40)), {})
    prompt = lab.ours.processor.assemble(family.placeholders["video"] + "?", [item])
    assert lab.ours.logits(prompt).isfinite().all()
    with pytest.raises(MediaError, match="too narrow"):
        family.prepare_video(clip(3, 2, (4400, 20)), {})


def test_a_message_states_its_video_s_pixels(lab: Lab) -> None:
    """As the authors' own messages do, beside the rate."""
    frames = [picture(50 + index, 128, 128) for index in range(2)]
    sizes = []
    for settings in ({}, {"max_pixels": 32 * 32, "min_pixels": 16 * 16}):
        part = {"type": "video", "video": frames, "fps": 2.0, **settings}
        prompt = lab.ours.processor.prepare([user(part, text("What happens?"))])
        sizes.append(prompt.media[0].processed_size)
    (width, height), (less_wide, less_high) = sizes
    assert less_wide * less_high <= 32 * 32 < width * height


def test_the_font_of_a_checkpoint_is_found_beside_its_settings(font: Path) -> None:
    (font.parent / "video_preprocessor_config.json").write_text('{"font": "../Roboto-Regular.ttf"}')
    assert read_processor_config(font.parent)["video_processor"]["font_file"] == str(font)
    frames = clip(9, 2, (90, 60)).frames
    written = [with_times(frames, (0.0, 3725.5), name) for name in (None, str(font))]
    assert all((drawn != frames).any(axis=(1, 2, 3)).all() for drawn in written)
    assert clock(3725.5) == "time: 01:02:05.50"
    with pytest.raises(MediaError, match="too small"):
        with_times(np.zeros((1, 8, 8, 3), np.uint8), (0.0,), None)


def test_the_authors_vocabulary_has_one_token_for_both(labs: Callable[[Case], Lab]) -> None:
    lab = labs(ernie.CASES[0])
    family = type(lab.ours.model.family)(dict(lab.case.config), {})
    assert family.media_token("video") == "<|VIDEO_PLACEHOLDER|>"
    family.name_tokens(lambda number: None)
    assert family.media_token("video") == "<|IMAGE_PLACEHOLDER|>"
    items = [
        family.prepare_image(picture(1, 60, 40), {}),
        family.prepare_video(clip(60, 2, (60, 40)), {}),
    ]
    text_of_both = family.expand("a<|video@placeholder|>b<|image@placeholder|>c", items)
    counts = [item.num_tokens for item in items]
    pad = "<|IMAGE_PLACEHOLDER|>"
    assert text_of_both == f"a{pad * counts[1]}b{pad * counts[0]}c"
