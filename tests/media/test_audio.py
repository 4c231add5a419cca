"""Sounds of every format, rate and layout become mono float32 at the rate asked for."""

import base64
import io

import numpy as np
import pytest
import soundfile
import soxr

from opsin.errors import MediaError, MediaTimeout, MediaTooLarge, UnsupportedMedia
from opsin.media import audio as audio_module
from opsin.media.audio import load_audio
from opsin.media.limits import Deadline, MediaLimits
from tests.media.samples import (
    LOOPBACK,
    clip,
    encoded_sound,
    refusal_line,
    reply,
    tone,
    web_server,
)

RATE = 44_100


def written(samples, name, subtype, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=name, subtype=subtype)
    return buffer.getvalue()


def mono(samples, rate, wanted=16_000):
    """What every decoder should come to: channels averaged, resampled in one piece."""
    return soxr.resample(samples.mean(axis=1), rate, wanted)


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [("WAV", "PCM_16", 1e-4), ("WAV", "PCM_24", 1e-5), ("WAV", "PCM_32", 1e-5),
     ("WAV", "FLOAT", 1e-6), ("WAV", "PCM_U8", 1e-2), ("FLAC", "PCM_16", 1e-4),
     ("AIFF", "PCM_16", 1e-4), ("OGG", "VORBIS", 5e-2), ("MP3", "MPEG_LAYER_III", 5e-2)],
)  # fmt: skip
def test_every_format_decodes_to_the_same_sound(name, subtype, tolerance):
    samples = tone()
    heard = load_audio(written(samples, name, subtype))
    expected = mono(samples, RATE)
    assert heard.dtype == np.float32
    assert heard.ndim == 1
    assert len(heard) == pytest.approx(len(expected), abs=10)
    count = min(len(heard), len(expected))
    assert np.abs(heard[:count] - expected[:count]).max() < tolerance


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [("mp4", "aac", 44_100), ("matroska", "aac", 48_000), ("webm", "libopus", 48_000)],
)
def test_what_only_ffmpeg_reads_decodes_in_step(container, codec, rate):
    samples = tone(rate=rate)
    heard = load_audio(encoded_sound(samples, rate, container, codec))
    expected = mono(samples, rate)
    inner = slice(500, len(expected) - 1000)
    assert np.abs(heard[inner] - expected[inner]).max() < 0.06


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_every_rate_and_channel_count(rate, channels):
    samples = tone(0.5, rate, channels)
    heard = load_audio(written(samples, "WAV", "FLOAT", rate))
    expected = mono(samples, rate)
    assert len(heard) == pytest.approx(8_000, abs=2)
    assert np.abs(heard[: len(expected)] - expected[: len(heard)]).max() < 1e-5
    assert len(load_audio(written(samples, "WAV", "FLOAT", rate), sample_rate=24_000)) == (
        pytest.approx(12_000, abs=2)
    )


def test_blocks_join_without_a_seam(monkeypatch):
    data = written(tone(), "WAV", "FLOAT")
    whole = load_audio(data)
    monkeypatch.setattr(audio_module, "BLOCK_SAMPLES", 1000)
    assert np.abs(load_audio(data) - whole).max() < 1e-6


def test_arrays_and_pairs_are_taken():
    samples = tone(0.5)
    expected = mono(samples, RATE)
    assert np.allclose(load_audio((samples, RATE)), expected, atol=1e-6)
    assert np.allclose(load_audio((samples.T, RATE)), expected, atol=1e-6)
    assert np.allclose(load_audio(samples, sample_rate=RATE), samples.mean(axis=1))
    assert load_audio(np.array([-32768, 0, 16384], np.int16)).tolist() == [-1, 0, 0.5]
    assert load_audio(np.array([0, 128, 192], np.uint8)).tolist() == [-1, 0, 0.5]
    assert load_audio(np.array([np.nan, np.inf, 1.0])).tolist() == [0, 0, 1]


def test_sounds_come_from_files_urls_and_data_urls(tmp_path):
    data = written(tone(0.2), "FLAC", "PCM_16")
    path = tmp_path / "a sound"
    path.write_bytes(data)
    data_url = "data:audio/flac;base64," + base64.b64encode(data).decode()
    with web_server(lambda handler: reply(handler, data)) as url:
        for source in (path, str(path), path.as_uri(), data, data_url, f"{url}/a"):
            assert len(load_audio(source, LOOPBACK)) == pytest.approx(3200, abs=2)
    with pytest.raises(MediaError, match="--media-root"):
        load_audio(path, MediaLimits(media_root=()))


def test_row_07_a_stated_length_over_the_budget_is_refused_before_decoding(monkeypatch):
    data = written(np.zeros((160_000, 1), np.float32), "FLAC", "PCM_16", 16_000)
    monkeypatch.setattr(audio_module._Sink, "write", lambda *_: pytest.fail("decoded"))
    with pytest.raises(MediaTooLarge, match=r"10 seconds.*9 seconds.*--max-audio-seconds"):
        load_audio(data, MediaLimits(max_audio_seconds=9))
    with pytest.raises(MediaTooLarge, match="--max-audio-seconds"):
        load_audio(np.zeros(160_000, np.float32), MediaLimits(max_audio_seconds=9))


def test_row_07_decoding_stops_at_the_budget_when_nothing_is_stated(monkeypatch):
    samples = np.zeros((48_000 * 30, 2), np.float32)
    data = encoded_sound(samples, 48_000, "webm", "libopus")
    assert len(data) < 100_000
    heard = []
    real = audio_module._Sink.write

    def write(self, block):
        heard.append(len(block))
        real(self, block)

    monkeypatch.setattr(audio_module._Sink, "write", write)
    with pytest.raises(MediaTooLarge, match=r"over 2 seconds.*--max-audio-seconds"):
        load_audio(data, MediaLimits(max_audio_seconds=2))
    assert sum(heard) < 48_000 * 3


def test_headers_with_absurd_rates_or_channels_are_refused():
    wav = bytearray(written(tone(0.1), "WAV", "PCM_16"))
    for at, value in ((24, 5), (24, 2_000_000_000), (22, 1000)):
        lying = bytearray(wav)
        size = 2 if at == 22 else 4
        lying[at : at + size] = value.to_bytes(size, "little")
        with pytest.raises(MediaError):
            load_audio(bytes(lying))
    with pytest.raises(UnsupportedMedia, match="samples a second"):
        load_audio((np.zeros(10, np.float32), 5))


def test_what_is_no_sound_is_named():
    with pytest.raises(UnsupportedMedia, match="no audio stream"):
        load_audio(clip(5))
    with pytest.raises(MediaError, match="no samples"):
        load_audio(written(np.zeros((0, 1), np.float32), "WAV", "PCM_16"))
    with pytest.raises(MediaError, match="no samples"):
        load_audio(np.zeros(0, np.float32))
    for data in (b"", b"text\n" * 100, bytes(5000), b"RIFF", b"ID3", b"OggS"):
        with pytest.raises(MediaError):
            load_audio(data)
    for source in (None, 5, {"a": 1}, [1, 2]):
        with pytest.raises(UnsupportedMedia, match=type(source).__name__):
            load_audio(source)
    for array in (np.zeros((2, 2, 2)), np.array(["a"]), np.array(1.0)):
        with pytest.raises(MediaError, match="shape"):
            load_audio(array)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "mp4"])
def test_row_23_cut_and_flipped_files_are_errors_or_sounds(kind):
    if kind == "mp4":
        data = encoded_sound(tone(0.3), RATE, "mp4", "aac")
    else:
        subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(kind, "PCM_16")
        data = written(tone(0.3), kind, subtype)
    flipped = bytearray(data)
    for at in range(0, len(data), max(1, len(data) // 20)):
        assert "0x" not in refusal_line(load_audio, data[:at])
        flipped[at] ^= 0xFF
        assert "0x" not in refusal_line(load_audio, bytes(flipped))
        flipped[at] ^= 0xFF


def test_row_23_the_deadline_ends_a_sound_too(monkeypatch):
    data = written(tone(), "WAV", "PCM_16")
    deadline = Deadline(60)
    left = iter([1.0] * 5)
    monkeypatch.setattr(deadline, "remaining", lambda: next(left, 0.0))
    with pytest.raises(MediaTimeout, match="--media-timeout"):
        audio_module.decode_audio(data, 16_000, MediaLimits(), deadline)
