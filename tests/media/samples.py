"""Small media files made on the spot, and a loopback web server that serves what a test says."""

import io
import threading
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
from PIL import Image

from opsin.errors import MediaError
from opsin.media.limits import MediaLimits

LOOPBACK = MediaLimits(allow_private_addresses=True, deadline=20)


def picture(width=32, height=24):
    """A picture whose four corners are red, green, blue and white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    half, middle = height // 2, width // 2
    pixels[:half, :middle] = (250, 0, 0)
    pixels[:half, middle:] = (0, 250, 0)
    pixels[half:, :middle] = (0, 0, 250)
    pixels[half:, middle:] = (250, 250, 250)
    return Image.fromarray(pixels)


def refusal_line(load, source, **options):
    """The error line of a load that may fail, "" where it succeeds; other errors come through."""
    try:
        load(source, **options)
    except MediaError as error:
        return error.line()
    return ""


def saved(image, name, **options):
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def shade(index):
    """The grey level of frame `index` of every clip here."""
    return 16 + index * 3 % 224


def frame_pixels(index, width, height):
    pixels = np.full((height, width, 3), shade(index), np.uint8)
    pixels[: height // 4, : width // 4] = (255, 0, 0)
    return pixels


def clip(count=60, size=(64, 48), container="mp4", codec="libx264", rate=30, **options):
    """Bytes of a video. options: gop, rotation, times (milliseconds of each frame)."""
    buffer = io.BytesIO()
    times = options.get("times") or [round(index * 1000 / rate) for index in range(count)]
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = options.get("gop", 12)
        stream.codec_context.time_base = Fraction(1, 1000)
        if "rotation" in options:
            stream.set_display_rotation(options["rotation"])
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(frame_pixels(index, *size), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def shades(video):
    """The grey level of each frame, read at its lower right corner."""
    return video.frames[:, -4, -4, 0].astype(int)


def tone(seconds=1.0, rate=44_100, channels=2):
    """A rising tone, float32 (samples, channels), the second channel at half the level."""
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * (300 + 200 * time) * time)
    levels = np.array([1.0, 0.5, 0.25, 0.25, 0.25, 0.25])[:channels]
    return (wave[:, None] * levels).astype(np.float32)


def encoded_sound(samples, rate, container, codec):
    """Bytes of a sound that FFmpeg encodes; samples (n, channels)."""
    buffer = io.BytesIO()
    layout = "stereo" if samples.shape[1] == 2 else "mono"
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 192_000
        for start in range(0, len(samples), 1024):
            block = np.ascontiguousarray(samples[start : start + 1024].T)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


@contextmanager
def web_server(answer):
    """A server on a free loopback port: `answer(handler)` writes each GET reply. Gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with suppress(BrokenPipeError, ConnectionResetError):
                answer(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(handler, body=b"", status=200, **headers):
    handler.send_response(status)
    headers.setdefault("Content_Length", str(len(body)))
    for key, value in headers.items():
        handler.send_header(key.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)
