"""Decodes chosen frames of any video container through PyAV: seeks where that saves decoding."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

import av

from opsin.errors import MediaError, UnsupportedMedia
from opsin.media.failure import CORRUPT, reason
from opsin.media.limits import Deadline, MediaLimits
from opsin.media.sampling import Chooser, Video, VideoInfo, check_choice
from opsin.media.source import Opened

if TYPE_CHECKING:
    import numpy as np

# Demuxers that read one file and nothing else. Playlists and scripts (hls, dash, concat, sdp,
# image2) are out: they would open other files and addresses.
DEMUXERS = ",".join(
    (
        "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,asf,ogg,h264",
        "hevc,obu,av1,ivf,mxf,nut,dv,rm,swf,wtv,vc1,m4v,y4m,yuv4mpegpipe,h263,mjpeg,gif",
        "mp3,aac,flac,wav,w64,aiff,caf,amr,ac3,eac3,ape,wv,tta,au,dsf,truehd,dts,mpc,mpc8,voc,latm",
    )
)
# Up to this size a file is read through once, which gives every frame's exact time.
SURVEY_BYTES = 64 * 2**20
MAX_DAMAGED_PACKETS = 64
DAMAGED: tuple[type[Exception], ...] = (av.FFmpegError, *CORRUPT)
SEEK_FRAMES = 8
SEEK_SECONDS = 2.0
_BACK_OFF_SECONDS = (0.0, 1.0, 8.0, 64.0)


class TimedFile:
    """A binary file whose reads fail after the deadline, so that no library can loop on it."""

    def __init__(self, file: BinaryIO, deadline: Deadline, name: str) -> None:
        self._file = file
        self._deadline = deadline
        self._what = name

    def read(self, size: int = -1) -> bytes:
        self._deadline.check(self._what)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._deadline.check(self._what)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def open_container(opened: Opened, deadline: Deadline) -> Iterator[Any]:
    """A PyAV input over an opened file that can reach nothing but that file."""
    opened.file.seek(0)
    with damaged_as_media_error(opened.name):
        container = av.open(
            TimedFile(opened.file, deadline, opened.name),
            mode="r",
            options={"format_whitelist": DEMUXERS, "protocol_whitelist": "none"},
            metadata_errors="ignore",
            buffer_size=1 << 18,
        )
        try:
            yield container
        finally:
            container.close()


@contextmanager
def damaged_as_media_error(name: str) -> Iterator[None]:
    """Turns what FFmpeg and its binding raise into a MediaError that names the media."""
    try:
        yield
    except DAMAGED as error:
        raise MediaError(
            f"{name} cannot be decoded",
            why=f"it is damaged, incomplete or of an unknown format ({reason(error)})",
            remedy="Check that the whole file was sent, or convert it to MP4 or WAV",
        ) from None


@dataclass(frozen=True, slots=True)
class _Survey:
    """What one look at a file told: positions are in units of the stream's time base.

    times: position of every frame in order, () when not read through or not stated by the file.
    keyframes: positions of the frames that decoding can start at, in order.
    counted: the file states no times, so positions are frame numbers.
    """

    info: VideoInfo
    first: int
    times: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()
    counted: bool = False


def decode_container(
    opened: Opened, choose: Chooser, limits: MediaLimits, deadline: Deadline
) -> Video:
    """The chosen frames of a video file."""
    with open_container(opened, deadline) as container:
        survey = _survey(container, _video_stream(container, opened, limits), opened, deadline)
    chosen = check_choice(choose(survey.info), survey.info, limits, opened.name)
    with open_container(opened, deadline) as container:
        stream = _video_stream(container, opened, limits)
        reader = _Reader(container, stream, survey, deadline, opened.name)
        return reader.read(chosen)


def _video_stream(container: Any, opened: Opened, limits: MediaLimits) -> Any:
    pictures = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    if not streams:
        raise UnsupportedMedia(
            f"{opened.name} is not a video",
            why="it has no video stream",
            remedy="Pass it as audio" if container.streams.audio else "Give a video file",
        )
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise UnsupportedMedia(
            f"{opened.name} was not decoded",
            why="its codec is not known here",
            remedy="Convert it to H.264 in MP4",
        )
    limits.check("max_pixels", context.width * context.height, opened.name, "pixels a frame")
    # The decoder itself refuses a size that grows in mid-stream.
    context.options = {"max_pixels": str(limits.max_pixels)}
    stream.thread_type = "AUTO"
    return stream


def _survey(container: Any, stream: Any, opened: Opened, deadline: Deadline) -> _Survey:
    """Decode the first frame for the true size; read all packets' times when that is cheap."""
    stated = stream.frames or (stream.duration or container.duration)
    through = opened.size <= SURVEY_BYTES or not stated
    first_frame = None
    times: list[int | None] = []
    keyframes: list[int] = []
    for packet in container.demux(stream):
        deadline.check(opened.name)
        if first_frame is None:
            first_frame = next(iter(_frames_of(packet)), None)
        if packet.size and not packet.is_discard:
            times.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keyframes.append(packet.pts)
        if first_frame is not None and not through:
            break
    if first_frame is None:
        raise MediaError(
            f"{opened.name} cannot be decoded",
            why="no frame of it decodes",
            remedy="Check that the whole file was sent",
        )
    if not through:
        info = _stated_info(container, stream, first_frame)
        first = stream.start_time if stream.start_time is not None else first_frame.pts or 0
        return _Survey(info, first)
    known = sorted(time for time in times if time is not None)
    if len(known) != len(times) or len(set(known)) != len(known):
        return _Survey(_counted_info(stream, first_frame, len(times)), 0, counted=True)
    return _Survey(
        _timed_info(stream, first_frame, known), known[0], tuple(known), tuple(sorted(keyframes))
    )


def _frames_of(packet: Any) -> list[Any]:
    try:
        return list(packet.decode())
    except av.error.InvalidDataError:
        return []


def _rate(stream: Any) -> float:
    """Frames per second as the file states it; 25 where it states nothing sensible."""
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate is not None and 0.001 < rate < 1000:
            return float(rate)
    return 25.0


def _shown_size(frame: Any) -> tuple[int, int]:
    turned = _quarter_turns(frame) % 2
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def _quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that show the frame upright."""
    return round(frame.rotation / 90) % 4


def _stated_info(container: Any, stream: Any, frame: Any) -> VideoInfo:
    fps = _rate(stream)
    if stream.duration:
        duration = float(stream.duration * stream.time_base)
    elif container.duration:
        duration = container.duration / av.time_base
    else:
        duration = stream.frames / fps
    count = stream.frames or int(duration * fps)
    return VideoInfo(max(1, count), fps, duration, *_shown_size(frame))


def _counted_info(stream: Any, frame: Any, count: int) -> VideoInfo:
    fps = _rate(stream)
    return VideoInfo(max(1, count), fps, max(1, count) / fps, *_shown_size(frame))


def _timed_info(stream: Any, frame: Any, times: Sequence[int]) -> VideoInfo:
    base = float(stream.time_base)
    seconds = tuple((time - times[0]) * base for time in times)
    fps = _rate(stream)
    span = seconds[-1]
    measured = (len(times) - 1) / span if span > 0 else fps
    # A header may state any rate; one that contradicts the frames' own times is not believed.
    if not 0.5 < measured / fps < 2:
        fps = measured
    return VideoInfo(len(times), fps, span + 1 / fps, *_shown_size(frame), seconds)


class _Reader:
    """Decodes forward through one stream and jumps to a later keyframe when one is on the way.

    A position is a frame's presentation time, or its count where the file states no times.
    """

    def __init__(
        self, container: Any, stream: Any, survey: _Survey, deadline: Deadline, name: str
    ) -> None:
        self.container = container
        self.stream = stream
        self.survey = survey
        self.deadline = deadline
        self.name = name
        self.damaged = 0
        self.position = survey.first
        self.can_seek = not survey.counted
        # Frames that no other refers to need no decoding on the way; counting needs them all.
        self.can_skip = not survey.counted
        self._wanted = survey.first
        self.per_second = survey.info.fps if survey.counted else float(1 / stream.time_base)
        self._min_gap = SEEK_SECONDS * self.per_second
        self._last: Any = None
        self._frames = self._decode()

    def read(self, chosen: tuple[int, ...]) -> Video:
        """The frames of those numbers, which ascend."""
        import numpy as np

        info = self.survey.info
        frames = np.empty((len(chosen), info.height, info.width, 3), np.uint8)
        times: list[float] = []
        for row, index in enumerate(chosen):
            target = self._target(index)
            if self._last is None or self.position < target:
                frames[row] = self._pixels(self._advance(target))
            else:
                frames[row] = frames[row - 1]
            times.append((self.position - self.survey.first) / self.per_second)
        return Video(frames, tuple(times), chosen, info, self.damaged)

    def _target(self, index: int) -> int:
        """The least position at which frame `index` may lie."""
        if self.survey.counted:
            return index
        if self.survey.times:
            return self.survey.times[index]
        return self.survey.first + int((index - 0.5) / self.survey.info.fps * self.per_second)

    def _advance(self, target: int) -> Any:
        self._wanted = target
        if self._jump_helps(target):
            self._jump(target)
        found = self._next_from(target)
        if found is None and self.can_skip:
            # The last frame of all may be one that was skipped.
            self.can_skip = False
            self._jump(target)
            found = self._next_from(target)
        if found is not None:
            return found
        slack = max(self.per_second, 0.02 * self.survey.info.duration * self.per_second)
        if self._last is None or self.position < target - slack:
            seconds = max(0.0, (self.position - self.survey.first) / self.per_second)
            raise MediaError(
                f"{self.name} breaks off",
                why=f"no frame decodes after {seconds:.2f} of "
                f"{self.survey.info.duration:.2f} seconds",
                remedy="Check that the whole file was sent, or save it again",
            )
        return self._last

    def _next_from(self, target: int) -> Any:
        """The next frame that is not before `target`, None at the end."""
        return next((frame for frame in self._frames if self.position >= target), None)

    def _jump_helps(self, target: int) -> bool:
        if not self.can_seek:
            return False
        if not self.survey.times:
            return target - self.position > self._min_gap
        before = bisect_right(self.survey.keyframes, target) - 1
        frames = SEEK_FRAMES / self.survey.info.fps * self.per_second
        return before >= 0 and self.survey.keyframes[before] > self.position + frames

    def _jump(self, target: int) -> None:
        """Continue from a keyframe at or before `target`."""
        start = self.position
        for seconds in _BACK_OFF_SECONDS:
            self._seek(target - int(seconds * self.per_second))
            landed = next(self._frames, None)
            if landed is not None and self.position <= target:
                self._frames = chain((landed,), self._frames)
                if self.position <= start:
                    # No keyframe lay between: ask again only over longer gaps.
                    self._min_gap = max(2 * self._min_gap, 1.5 * (target - start))
                return
        self.can_seek = False
        self._seek(self.survey.first)

    def _seek(self, position: int) -> None:
        self.container.seek(max(position, self.survey.first), stream=self.stream)
        self._frames = self._decode()

    def _decode(self) -> Iterator[Any]:
        """Frames from the current place on; `position` is that of the frame given last."""
        count = -1
        for packet in self.container.demux(self.stream):
            self.deadline.check(self.name)
            on_the_way = packet.pts is not None and packet.pts < self._wanted
            skips = self.can_skip and on_the_way
            self.stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                self._count_damage()
                continue
            for frame in frames:
                count += 1
                self._last = frame
                self.position = count if self.survey.counted else self._time(frame)
                yield frame

    def _time(self, frame: Any) -> int:
        if frame.pts is not None:
            return int(frame.pts)
        return self.position if frame.dts is None else int(frame.dts)

    def _count_damage(self) -> None:
        self.damaged += 1
        if self.damaged > MAX_DAMAGED_PACKETS:
            raise MediaError(
                f"{self.name} cannot be decoded",
                why=f"more than {MAX_DAMAGED_PACKETS} pieces of it are damaged",
                remedy="Check that the whole file was sent, or save it again",
            )

    def _pixels(self, frame: Any) -> np.ndarray:
        """uint8 (height, width, 3), upright, at the size of the first frame."""
        import numpy as np

        info = self.survey.info
        turns = _quarter_turns(frame)
        width, height = (info.height, info.width) if turns % 2 else (info.width, info.height)
        if (frame.width, frame.height) != (width, height):
            frame = frame.reformat(width=width, height=height, format="rgb24")
        return np.rot90(frame.to_ndarray(format="rgb24"), turns)
