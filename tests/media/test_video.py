"""Videos: which frames are kept, their times, and what a hostile file may cost."""

import dataclasses
import io
import itertools
import threading

import av
import numpy as np
import pytest
from PIL import Image

from opsin.errors import MediaError, MediaTimeout, MediaTooLarge, UnsupportedMedia
from opsin.media import container as container_module
from opsin.media.limits import MediaLimits
from opsin.media.sampling import VideoInfo, uniform_indices
from opsin.media.video import load_video
from tests.media.samples import (
    LOOPBACK,
    clip,
    encoded_sound,
    picture,
    refusal_line,
    reply,
    saved,
    shade,
    shades,
    tone,
    web_server,
)

CONTAINERS = [
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("matroska", "libx264"),
    ("webm", "libvpx"),
    ("avi", "mpeg4"),
    ("mpegts", "libx264"),
    ("flv", "flv1"),
    ("h264", "libx264"),
]


@pytest.fixture(scope="module")
def mp4():
    return clip(60)


def assert_shades(video, tolerance=6):
    expected = np.array([shade(index) for index in video.indices])
    assert np.abs(shades(video) - expected).max() <= tolerance


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_every_container_gives_the_frames_asked_for(container, codec):
    video = load_video(clip(60, container=container, codec=codec), fps=None, max_frames=8)
    assert video.indices == (0, 8, 17, 25, 34, 42, 51, 59)
    assert video.frames.shape == (8, 48, 64, 3)
    assert video.frames.dtype == np.uint8
    assert_shades(video)
    rate = 25 if container == "h264" else 30
    assert video.timestamps == pytest.approx([i / rate for i in video.indices], abs=0.002)
    assert video.info.num_frames == 60
    assert video.fps == pytest.approx(rate, rel=0.01)
    assert video.duration == pytest.approx(60 / rate, abs=0.05)


def test_fps_says_how_many_frames_and_first_and_last_are_kept(mp4):
    for fps, count in ((1, 2), (2, 4), (4, 8), (0.1, 2), (1000, 60)):
        video = load_video(mp4, fps=fps)
        assert len(video.indices) == count
        assert (video.indices[0], video.indices[-1]) == (0, 59)
    assert load_video(mp4, fps=1000, max_frames=5).indices == (0, 15, 30, 44, 59)
    assert load_video(mp4, max_frames=1).indices == (0,)


def test_a_family_may_choose_its_own_frames(mp4):
    seen = []

    def choose(info):
        seen.append(info)
        return [0, 3, 3, 58]

    video = load_video(mp4, choose=choose)
    assert video.indices == (0, 3, 3, 58)
    assert_shades(video)
    assert np.array_equal(video.frames[1], video.frames[2])
    assert (seen[0].num_frames, seen[0].width, seen[0].height) == (60, 64, 48)


@pytest.mark.parametrize("chosen", [[], [60], [-1], [3, 2]])
def test_frames_that_do_not_exist_are_refused(mp4, chosen):
    with pytest.raises(MediaError, match="from 0 to 59"):
        load_video(mp4, choose=lambda info: chosen)


def test_variable_frame_rates_are_sampled_evenly_in_time():
    times = [*range(0, 1000, 50), *range(1000, 9001, 1000)]
    video = load_video(clip(times=times), fps=None, max_frames=10)
    assert video.timestamps == pytest.approx(list(range(10)), abs=0.05)
    assert video.info.timestamps == pytest.approx([time / 1000 for time in times], abs=0.002)
    assert_shades(video)


@pytest.mark.parametrize(
    ("rotation", "corner"), [(90, (-4, 4)), (-90, (4, -4)), (180, (-4, -4)), (0, (4, 4))]
)
def test_rotation_metadata_is_applied(rotation, corner):
    video = load_video(clip(10, rotation=rotation), fps=None)
    turned = rotation in (90, -90)
    assert video.frames.shape[1:3] == ((64, 48) if turned else (48, 64))
    assert (video.info.width, video.info.height) == ((48, 64) if turned else (64, 48))
    red, green, _ = (int(value) for value in video.frames[0][corner])
    assert red > 180
    assert green < 80


@pytest.fixture
def decoded_frames(monkeypatch):
    """How many frames the reader decoded (frames, not counting the survey's first)."""
    seen = []
    real = container_module._Reader._time

    def count(self, frame):
        seen.append(frame.pts)
        return real(self, frame)

    monkeypatch.setattr(container_module._Reader, "_time", count)
    return seen


@pytest.mark.parametrize("read_through", [True, False])
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_seeking_gives_the_frames_that_decoding_all_gives(
    container, read_through, decoded_frames, monkeypatch
):
    data = clip(600, container=container, gop=30)
    whole = load_video(data, fps=None, choose=lambda info: range(600))
    assert len(decoded_frames) >= 600
    decoded_frames.clear()
    if not read_through:
        monkeypatch.setattr(container_module, "SURVEY_BYTES", 0)
    video = load_video(data, fps=None, max_frames=6)
    assert video.indices == (0, 120, 240, 359, 479, 599)
    assert np.array_equal(video.frames, whole.frames[list(video.indices)])
    assert video.timestamps == pytest.approx([i / 30 for i in video.indices], abs=0.002)
    assert len(decoded_frames) < 260
    assert (video.info.timestamps is None) is not read_through


def test_without_keyframes_between_no_seek_repeats_the_work(decoded_frames, monkeypatch):
    data = clip(600, gop=1000)
    load_video(data, fps=None, max_frames=8)
    assert len(decoded_frames) <= 640
    decoded_frames.clear()
    monkeypatch.setattr(container_module, "SURVEY_BYTES", 0)
    assert load_video(data, fps=None, max_frames=8).indices[-1] == 599
    assert len(decoded_frames) < 1200


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_that_no_other_refers_to_are_skipped_on_the_way(codec, decoded_frames):
    data = clip(200, gop=1000, codec=codec)
    whole = load_video(data, fps=None)
    decoded_frames.clear()
    chosen = [0, 60, 61, 62, 130, 199]
    video = load_video(data, choose=lambda info: chosen)
    assert np.array_equal(video.frames, whole.frames[chosen])
    if codec == "libx264":  # which writes such frames
        assert len(decoded_frames) < 150


@pytest.mark.parametrize("missing", [1, 20])
def test_the_last_frame_is_found_where_a_file_states_too_many(missing, monkeypatch):
    data = clip(120, gop=30)
    whole = load_video(data, fps=None)
    real = container_module._stated_info

    def overstated(*given):
        info = real(*given)
        return dataclasses.replace(info, num_frames=info.num_frames + missing)

    monkeypatch.setattr(container_module, "_stated_info", overstated)
    monkeypatch.setattr(container_module, "SURVEY_BYTES", 0)
    video = load_video(data, fps=None, max_frames=3)
    assert np.array_equal(video.frames[-1], whole.frames[-1])


def animation(name, count=12, **options):
    frames = [
        Image.new("RGB", (16, 12), (shade(index), shade(index), shade(index)))
        for index in range(count)
    ]
    options = {"duration": 100, **({"lossless": True} if name == "WEBP" else {}), **options}
    return saved(frames[0], name, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_are_videos(name):
    video = load_video(animation(name), fps=None)
    assert video.indices == tuple(range(12))
    assert_shades(video, 1)
    assert video.timestamps == pytest.approx([i / 10 for i in range(12)])
    assert (video.fps, video.duration) == (pytest.approx(10), pytest.approx(1.2))
    assert load_video(animation(name), fps=2).indices == (0, 11)
    uneven = load_video(animation(name, 4, duration=[100, 200, 1000, 300]), fps=None)
    assert uneven.timestamps == pytest.approx([0, 0.1, 0.3, 1.3])
    assert uneven.duration == pytest.approx(1.6)


def test_an_animated_png_with_its_own_still_leaves_that_out():
    still = Image.new("RGB", (16, 12), (1, 2, 3))
    frames = [Image.new("RGB", (16, 12), (shade(i),) * 3) for i in range(3)]
    data = saved(
        still, "PNG", save_all=True, append_images=frames, default_image=True, duration=100
    )
    assert_shades(load_video(data, fps=None), 1)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_still_picture_is_a_video_of_one_frame(name):
    video = load_video(saved(picture(), name))
    assert (video.indices, video.timestamps) == ((0,), (0.0,))
    assert video.frames.shape == (1, 24, 32, 3)


def test_frames_may_be_given_as_arrays_or_pictures():
    pixels = np.stack([np.asarray(picture()) // (i + 1) for i in range(6)])
    for source in (
        pixels,
        pixels.transpose(0, 3, 1, 2),
        list(pixels),
        [Image.fromarray(frame) for frame in pixels],
        tuple(saved(Image.fromarray(frame), "PNG") for frame in pixels),
    ):
        video = load_video(source, fps=2)
        assert np.array_equal(video.frames, pixels)
        assert video.timestamps == (0, 0.5, 1, 1.5, 2, 2.5)
    assert load_video(pixels, max_frames=2).indices == (0, 5)
    with pytest.raises(MediaError, match="frame 1 is 5x5, the first 32x24"):
        load_video([picture(), picture(5, 5)])
    for empty in ([], np.zeros((0, 4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)):
        with pytest.raises(MediaError):
            load_video(empty)


def test_videos_come_from_files_urls_and_data_urls(mp4, tmp_path):
    import base64

    path = tmp_path / "clip.bin"
    path.write_bytes(mp4)
    data_url = "data:video/mp4;base64," + base64.b64encode(mp4).decode()
    with web_server(lambda handler: reply(handler, mp4)) as url:
        for source in (path, path.as_uri(), data_url, f"{url}/v"):
            assert load_video(source, LOOPBACK, fps=1).indices == (0, 59)
    with pytest.raises(MediaError, match="--media-root"):
        load_video(path, MediaLimits(media_root=()))


def test_row_06_jpeg_frame_lists_are_counted_before_decoding(monkeypatch):
    import base64

    frame = base64.b64encode(saved(picture(), "JPEG")).decode()
    url = "data:video/jpeg;base64,"
    assert load_video(url + ",".join([frame] * 3), fps=1).frames.shape == (3, 24, 32, 3)
    monkeypatch.setattr("base64.b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(MediaTooLarge, match=r"5,001 frames.*--max-video-frames"):
        load_video(url + "," * 5000)
    with pytest.raises(MediaTooLarge, match="--max-media-bytes"):
        load_video(url + "A" * 4000, MediaLimits(max_bytes=1000))


def test_row_08_absurd_rates_and_counts_are_refused_or_harmless(mp4):
    for fps in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(MediaError, match="fps"):
            load_video(mp4, fps=fps)
    with pytest.raises(MediaError, match="below 1"):
        load_video(mp4, max_frames=0)
    with pytest.raises(MediaTooLarge, match=r"1000000000.*768.*--max-video-frames"):
        load_video(mp4, max_frames=10**9)


def test_row_08_frames_times_pixels_have_a_budget(mp4):
    limits = MediaLimits(max_video_pixels=64 * 48 * 10)
    assert len(load_video(mp4, limits, max_frames=10, fps=None).indices) == 10
    for source in (mp4, animation("GIF"), np.zeros((60, 48, 64, 3), np.uint8)):
        small = MediaLimits(max_video_pixels=16 * 12 * 11)
        with pytest.raises(MediaTooLarge, match=r"lower fps or max_frames.*--max-video-pixels"):
            load_video(source, small, fps=None)
    with pytest.raises(MediaTooLarge, match="--max-image-pixels"):
        load_video(mp4, MediaLimits(max_pixels=3000))


def test_row_08_a_gif_of_ten_thousand_frames_answers_in_bounded_time():
    one = animation("GIF", 2)
    block = one.index(b"\x21\xf9\x04")
    end = one.index(b"\x21\xf9\x04", block + 4)
    bomb = one[:block] + one[block:end] * 10_000 + b";"
    video = load_video(bomb, max_frames=4)
    assert video.info.num_frames == 10_000
    assert video.indices == (0, 3333, 6666, 9999)
    with pytest.raises(MediaTimeout, match="--media-timeout"):
        load_video(one[:block] + one[block:end] * 200_000 + b";", MediaLimits(deadline=0.3))


def test_row_23_cut_files_are_errors_or_shorter_clips():
    for container in ("mp4", "matroska", "mpegts", "avi"):
        codec = "mpeg4" if container == "avi" else "libx264"
        data = clip(30, container=container, codec=codec)
        for cut in range(0, len(data), max(1, len(data) // 15)):
            assert "0x" not in refusal_line(load_video, data[:cut], max_frames=4)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_row_23_cut_animations_are_errors_or_shorter_clips(name):
    data = animation(name)
    for cut in range(0, len(data), max(1, len(data) // 25)):
        line = refusal_line(load_video, data[:cut], fps=None)
        assert "0x" not in line
        assert line or len(load_video(data[:cut], fps=None).indices) <= 12


def test_row_23_flipped_bytes_never_escape_as_another_exception(mp4):
    data = bytearray(mp4)
    for at in range(0, len(data), len(data) // 60):
        data[at] ^= 0xFF
        assert "0x" not in refusal_line(load_video, bytes(data), max_frames=3)
        data[at] ^= 0xFF


def test_row_23_a_header_that_lies_about_length_is_found_out(monkeypatch):
    data = clip(90, container="matroska", gop=30)
    at = data.index(b"\x44\x89\x88") + 3
    lying = data[:at] + np.array([36_000_000.0], ">f8").tobytes() + data[at + 8 :]
    video = load_video(lying, fps=None, max_frames=3)
    assert (video.indices, video.info.num_frames) == ((0, 45, 89), 90)
    monkeypatch.setattr(container_module, "SURVEY_BYTES", 0)
    with pytest.raises(MediaError, match="breaks off"):
        load_video(lying, max_frames=3)


def test_row_23_reading_stops_at_the_deadline(monkeypatch):
    """The thread that is left behind ends too: every read of the file looks at the deadline."""
    clock = itertools.count()
    ended = threading.Event()
    real = container_module._survey

    def survey(container, stream, opened, deadline):
        monkeypatch.setattr(deadline, "remaining", lambda: 5.0 if next(clock) < 3 else 0.0)
        try:
            return real(container, stream, opened, deadline)
        finally:
            ended.set()

    monkeypatch.setattr(container_module, "_survey", survey)
    with pytest.raises(MediaTimeout):
        load_video(clip(60))
    assert ended.wait(5)


def test_what_is_no_video_is_named():
    sound = encoded_sound(tone(0.2), 44_100, "mp4", "aac")
    with pytest.raises(UnsupportedMedia, match=r"no video stream\. Pass it as audio"):
        load_video(sound)
    for data in (b"", b"text\n" * 100, bytes(5000), b"\0\0\0\x18ftypisom"):
        with pytest.raises(MediaError):
            load_video(data)
    for source in (None, 5, {"a": 1}):
        with pytest.raises(UnsupportedMedia, match=type(source).__name__):
            load_video(source)


def test_cover_art_is_not_a_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.asarray(picture()), "rgb24")
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(UnsupportedMedia, match="no video stream"):
        load_video(buffer.getvalue())


@pytest.mark.parametrize("kind", ["hls", "concat", "sdp", "dash"])
def test_row_02_a_playlist_cannot_make_the_decoder_open_anything(kind):
    opened = []

    def answer(handler):
        opened.append(handler.path)
        reply(handler, b"")

    with web_server(answer) as url:
        text = {
            "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}/a.ts\n#EXT-X-ENDLIST\n",
            "concat": f"ffconcat version 1.0\nfile '{url}/a.mp4'\n",
            "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
            "m=video 5000 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
            "dash": f'<?xml version="1.0"?><MPD><Period><BaseURL>{url}/</BaseURL></Period></MPD>',
        }[kind]
        with pytest.raises(MediaError):
            load_video(text.encode())
    assert opened == []


def test_uniform_indices_keep_both_ends_for_every_count():
    for total in (1, 2, 3, 7, 100):
        times = tuple(index / 10 for index in range(total))
        plain = VideoInfo(total, 10, total / 10, 8, 8)
        timed = VideoInfo(total, 10, total / 10, 8, 8, times)
        for count in range(1, 12):
            chosen = uniform_indices(plain, None, count)
            assert len(chosen) == len(set(chosen)) == min(count, total)
            assert chosen == sorted(chosen)
            if count > 1:
                assert (chosen[0], chosen[-1]) == (0, total - 1)
            close = zip(uniform_indices(timed, None, count), chosen, strict=True)
            assert all(abs(a - b) <= 1 for a, b in close)


def test_row_08_the_decoder_itself_refuses_frames_that_outgrow_the_budget(monkeypatch, mp4):
    """A stream may state one size in its header and another inside."""
    monkeypatch.setattr(MediaLimits, "check", lambda *_: None)
    with pytest.raises(MediaError):
        load_video(mp4, MediaLimits(max_pixels=100))
