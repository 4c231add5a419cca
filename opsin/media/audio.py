"""Reads a sound from anything a user may give, as mono float32 at the rate a model asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from opsin.errors import MediaError, UnsupportedMedia
from opsin.media.failure import CORRUPT, source_name
from opsin.media.image import is_array
from opsin.media.limits import DEFAULT_LIMITS, Deadline, MediaLimits
from opsin.media.source import Opened, open_source
from opsin.media.worker import WORKERS

if TYPE_CHECKING:
    import numpy as np

DEFAULT_RATE = 16_000
LOWEST_RATE = 1_000
HIGHEST_RATE = 768_000
MAX_CHANNELS = 64
BLOCK_SAMPLES = 1 << 18


def load_audio(
    source: Any, limits: MediaLimits = DEFAULT_LIMITS, sample_rate: int = DEFAULT_RATE
) -> np.ndarray:
    """float32 (samples,) at `sample_rate` Hz, channels averaged, nominally -1 to 1.

    source: a path, an http(s), data or file URL, bytes (any sound format, or a video with a sound
    track), an array (samples,) or 2-D with channels on the shorter axis, already at `sample_rate`,
    or (array, its rate). Decoding stops at the limit of seconds. Raises MediaError or a subclass.
    """
    deadline = Deadline(limits.deadline)
    what = source_name(source, "audio")
    return WORKERS.run(lambda: decode_audio(source, sample_rate, limits, deadline), deadline, what)


def decode_audio(
    source: Any, sample_rate: int, limits: MediaLimits, deadline: Deadline
) -> np.ndarray:
    """`load_audio` without its worker thread, for callers that already run in one."""
    if is_array(source):
        return _from_array(source, sample_rate, sample_rate, limits, deadline)
    if isinstance(source, tuple) and len(source) == 2 and is_array(source[0]):
        return _from_array(source[0], int(source[1]), sample_rate, limits, deadline)
    with open_source(source, "audio", limits, deadline, in_place=True) as opened:
        sink = _Sink(sample_rate, limits, deadline, opened.name)
        if not _decode_soundfile(opened, sink, deadline):
            _decode_container(opened, sink, deadline)
        return sink.finish()


class _Sink:
    """Averages channels, resamples and counts seconds, block by block, so that memory stays flat
    until the budget is spent."""

    def __init__(
        self, sample_rate: int, limits: MediaLimits, deadline: Deadline, name: str
    ) -> None:
        self.sample_rate = sample_rate
        self.limits = limits
        self.deadline = deadline
        self.name = name
        self.rate = 0
        self._resampler: Any = None
        self._seconds = 0.0
        self._parts: list[np.ndarray] = []

    def start(self, rate: int, channels: int, seconds: float = 0.0) -> None:
        """Check what a header states before anything is decoded."""
        if not LOWEST_RATE <= rate <= HIGHEST_RATE or not 1 <= channels <= MAX_CHANNELS:
            raise UnsupportedMedia(
                f"{self.name} was not decoded",
                why=f"it states {rate} samples a second and {channels} channels",
                remedy="Convert it to WAV at 16 000 Hz",
            )
        self.limits.check("max_audio_seconds", seconds, self.name, "seconds")
        self.rate = rate
        if rate != self.sample_rate:
            import soxr

            self._resampler = soxr.ResampleStream(rate, self.sample_rate, 1, dtype="float32")

    def write(self, block: np.ndarray) -> None:
        """Add float32 samples, (samples, channels)."""
        import numpy as np

        self.deadline.check(self.name)
        self._seconds += len(block) / self.rate
        if self._seconds > self.limits.max_audio_seconds:
            limit = self.limits.max_audio_seconds
            raise self.limits.exceeded(
                "max_audio_seconds", self.name, f"over {limit:g} seconds", "seconds"
            )
        mono = block.mean(axis=1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0]
        mono = np.nan_to_num(mono, nan=0.0, posinf=0.0, neginf=0.0)
        self._parts.append(self._resample(mono) if self._resampler else mono)

    def _resample(self, mono: np.ndarray, last: bool = False) -> np.ndarray:
        return self._resampler.resample_chunk(mono, last=last)

    def finish(self) -> np.ndarray:
        """All samples so far, float32 (samples,)."""
        import numpy as np

        self.deadline.check(self.name)
        if self._seconds == 0.0:
            raise MediaError(
                f"{self.name} is empty", why="it has no samples", remedy="Check the file"
            )
        if self._resampler:
            self._parts.append(self._resample(np.zeros(0, np.float32), last=True))
        return np.ascontiguousarray(np.concatenate(self._parts), dtype=np.float32)


class _SilentFile:
    """A file for libsndfile, whose callbacks must not raise: it ends at the deadline instead."""

    def __init__(self, file: BinaryIO, deadline: Deadline) -> None:
        self._file = file
        self._deadline = deadline

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size) if self._deadline.remaining() > 0.0 else b""

    def seek(self, offset: int, whence: int = 0) -> int:
        # A damaged header can send the library to before the start.
        return self._file.seek(max(offset, 0) if whence == 0 else offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _decode_soundfile(opened: Opened, sink: _Sink, deadline: Deadline) -> bool:
    """Feed the sink from libsndfile; False where libsndfile does not know the format."""
    import soundfile

    from opsin.media.container import damaged_as_media_error

    opened.file.seek(0)
    try:
        sound = soundfile.SoundFile(_SilentFile(opened.file, deadline))
    except (soundfile.LibsndfileError, *CORRUPT):
        deadline.check(opened.name)
        return False
    with sound, damaged_as_media_error(opened.name):
        frames = max(0, sound.frames)
        # Formats without a length in the header state the largest number there is.
        stated = frames / max(1, sound.samplerate) if frames < 1 << 62 else 0.0
        sink.start(sound.samplerate, sound.channels, stated)
        size = max(1, BLOCK_SAMPLES // sound.channels)
        while True:
            block = sound.read(size, dtype="float32", always_2d=True)
            if not len(block):
                return True
            sink.write(block)


def _decode_container(opened: Opened, sink: _Sink, deadline: Deadline) -> None:
    import av

    from opsin.media.container import open_container

    with open_container(opened, deadline) as container:
        if not container.streams.audio:
            raise UnsupportedMedia(
                f"{opened.name} has no sound",
                why="the file holds no audio stream",
                remedy="Give a sound file, or a video with a sound track",
            )
        stream = container.streams.audio[0]
        context = stream.codec_context
        if context is None:
            raise UnsupportedMedia(
                f"{opened.name} was not decoded",
                why="its codec is not known here",
                remedy="Convert it to WAV",
            )
        damaged = 0
        resampler = None
        for packet in container.demux(stream):
            deadline.check(opened.name)
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                damaged += 1
                continue
            for frame in frames:
                if resampler is None:
                    sink.start(frame.sample_rate, frame.layout.nb_channels)
                    resampler = av.AudioResampler("fltp", frame.layout, frame.sample_rate)
                for piece in resampler.resample(frame):
                    sink.write(piece.to_ndarray().T)
        _refuse_damage(damaged, opened.name)


def _refuse_damage(damaged: int, name: str) -> None:
    if damaged > 1:
        # One bad packet at a cut is usual; more would leave holes that nobody is told of.
        raise MediaError(
            f"{name} cannot be decoded",
            why=f"{damaged} pieces of it are damaged",
            remedy="Check that the whole file was sent, or convert it to WAV",
        )


def _from_array(
    samples: np.ndarray, rate: int, sample_rate: int, limits: MediaLimits, deadline: Deadline
) -> np.ndarray:
    import numpy as np

    name = source_name(samples, "audio")
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "iuf":
        raise MediaError(
            f"{name} is no sound",
            why=f"its shape is {tuple(samples.shape)} and its dtype {samples.dtype}",
            remedy="Give float32 (samples,) or int16",
        )
    if samples.ndim == 1:
        samples = samples[:, None]
    elif samples.shape[0] < samples.shape[1]:
        samples = samples.T
    sink = _Sink(sample_rate, limits, deadline, name)
    sink.start(rate, samples.shape[1], len(samples) / max(1, rate))
    for block in _blocks(samples):
        if block.dtype.kind == "f":
            sink.write(block.astype(np.float32))
        else:
            span = np.iinfo(block.dtype)
            middle = (int(span.max) + int(span.min) + 1) // 2
            scale = (int(span.max) - int(span.min) + 1) / 2
            sink.write(((block.astype(np.float64) - middle) / scale).astype(np.float32))
    return sink.finish()


def _blocks(samples: np.ndarray) -> Iterator[np.ndarray]:
    size = max(1, BLOCK_SAMPLES // samples.shape[1])
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
