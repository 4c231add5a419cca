"""SmolVLM 2 (arXiv:2504.05299): Idefics 3 with video, its frames told by their times."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from opsin.families.base import MediaInput
from opsin.families.idefics3 import Idefics3
from opsin.media.sampling import Chooser, Video, VideoInfo
from opsin.towers import pixels

SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# Seconds left out at either end of a video that is longer than its frames can show.
MARGIN = 1


class SmolVLM(Idefics3):
    """Each frame is one whole tile."""

    modalities = ("image", "video")
    placeholders = {"image": "<image>", "video": "<video>"}
    media_tokens = {"video": "<image>"}

    @property
    def sampling(self) -> dict[str, Any]:
        """The checkpoint's `video_sampling`: frames a second, most frames, size."""
        return {"fps": 1, "max_frames": 64, **(self.processor_config.get("video_sampling") or {})}

    def frame_chooser(self, options: Mapping[str, Any]) -> Chooser:
        """Evenly, a second apart unless asked otherwise, without the ends of a long video."""
        rate = options.get("fps", self.sampling["fps"])
        most = options.get("max_frames", self.sampling["max_frames"])

        def choose(info: VideoInfo) -> list[int]:
            count = max(1, min(round(rate * info.duration), most))
            first, last = 0, info.num_frames - 1
            if info.duration - 2 * MARGIN > most * rate:
                first = int(MARGIN * info.fps)
                last = min(int(info.num_frames - MARGIN * info.fps), last)
            if first >= last:
                first, last = 0, info.num_frames - 1
            steps = torch.linspace(first, last, count, dtype=torch.float64)
            return sorted(set(steps.int().tolist()))

        return choose

    def prepare_video(self, video: Video, options: Mapping[str, Any]) -> MediaInput:
        del options
        whole: dict[str, Any] = {"do_image_splitting": False}
        if "video_size" in self.sampling:
            whole["size"] = self.sampling["video_size"]
        tiles = [self.tiles(Image.fromarray(frame), whole)[0] for frame in video.frames]
        return MediaInput(
            kind="video",
            features={"pixel_values": pixels.levels(tiles)},
            levels=self.levels,
            text=self.frames_text(video),
            num_tokens=len(tiles) * self.tile_tokens,
            processed_size=(self.tile, self.tile),
        )

    def frames_text(self, video: Video) -> str:
        """How many frames of how long a video, then each with its minute and second."""
        length = datetime.timedelta(seconds=int(video.duration))
        count = number_words(len(video.timestamps))
        parts = [
            f"You are provided the following series of {count} frames from a {length} "
            "[H:MM:SS] video.\n"
        ]
        for seconds in video.timestamps:
            minute, second = divmod(int(seconds), 60)
            parts.append(f"\nFrame from {minute:02d}:{second:02d}:{self.layout_text(1, 0)}")
        return "".join(parts) + "\n\n"


def number_words(number: int) -> str:
    """A number below a million in English words."""
    if number < 20:
        return SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{SMALL[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{SMALL[hundreds]} hundred" + (f" and {number_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if 0 < rest < 100 else ", "
    return f"{number_words(thousands)} thousand" + (joint + number_words(rest) if rest else "")


FAMILY = SmolVLM
