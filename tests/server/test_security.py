"""The rows of the security table that a server must hold, each by its number."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ..families.pictures import picture
from .conftest import KEY
from .running import Running, serving, wait_for


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def ask(server: Running, *parts: dict[str, Any], **fields: Any) -> Any:
    content = [*parts, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}
    return server.post("/v1/chat/completions", body)


def as_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def is_clean(text: str) -> bool:
    """No traceback, no object's repr, no address, no file of ours."""
    return not any(word in text for word in ("Traceback", " object at 0x", "<opsin", ".py"))


@pytest.mark.parametrize(
    "url",
    [
        "http://ok\\@169.254.169.254/x.png",
        "http://user@127.0.0.1/x.png",
        "http://0x7f.1/x.png",
        "http://2130706433/x.png",
        "http://[::ffff:127.0.0.1]/x.png",
        "http://127.0.0.1./x.png",
        "HTTP://LOCALHOST/x.png",
        "http://127.0.0.1:/x.png",
    ],
)
def test_row_01_one_parse_of_a_url(server: Running, url: str) -> None:
    reply = ask(server, image_part(url))
    assert reply.status_code == 400
    assert is_clean(reply.text)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/health",
        "http://10.0.0.1/x.png",
        "http://169.254.169.254/latest",
        "http://100.64.0.1/x",
        "http://[fe80::1]/x",
        "http://0.0.0.0/x",
        "http://224.0.0.1/x",
    ],
)
def test_row_02_private_addresses_are_not_fetched(server: Running, url: str) -> None:
    reply = ask(server, image_part(url.format(port=server.server.port)))
    assert reply.status_code == 400
    assert "address" in reply.json()["error"]["message"]


def test_row_03_text_is_never_searched_for_urls(server: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        text = f"![x](http://127.0.0.1:{port}/x.png) <img src='http://127.0.0.1:{port}/y.png'>"
        assert server.chat(text).status_code == 200
        with pytest.raises(TimeoutError):
            listener.accept()


def test_row_05_a_prompts_cache_is_its_keys_own(keyed: Running) -> None:
    text = "The same long words again and again. " * 8

    def cached(key: str, **fields: Any) -> int:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, **fields}
        headers = {"authorization": f"Bearer {key}"}
        reply = keyed.post("/v1/chat/completions", body, headers=headers)
        return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached("another-key") == 0
    assert cached(KEY, cache_salt="mine") == 0
    assert cached(KEY, cache_salt="mine") > 0


def test_row_08_bombs_are_refused_by_their_headers(server: Running) -> None:
    huge = Image.new("1", (20_000, 20_000))
    started = time.monotonic()
    reply = ask(server, image_part(as_url(huge)))
    assert reply.status_code == 413
    assert "--max-image-pixels" in reply.json()["error"]["message"]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("field", "value"), [("resize_shape", [16384, 16384]), ("processor_kwargs", {"x": 10**12})]
)
def test_row_08_options_cannot_blow_a_picture_up(
    server: Running, data_url: str, field: str, value: Any
) -> None:
    reply = ask(server, image_part(data_url), **{field: value})
    assert reply.status_code == 413
    assert "--max-image-pixels" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/load"])
@pytest.mark.parametrize("body", [b"", b"{", b'{"model": 1}', b"[]", b'{"x": "\\ud800"}', b"\x00"])
def test_row_09_errors_hold_no_repr(server: Running, path: str, body: bytes) -> None:
    reply = server.client.post(path, content=body)
    assert reply.status_code == 400
    assert is_clean(reply.text)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "data:image/png;base64,!", "data:,"])
def test_row_09_errors_of_media_hold_no_repr(server: Running, url: str) -> None:
    reply = ask(server, image_part(url))
    assert reply.status_code in (400, 415)
    assert is_clean(reply.text)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2000, 10)])
def test_row_10_odd_pictures_leave_the_engine_standing(
    server: Running, size: tuple[int, int]
) -> None:
    reply = ask(server, image_part(as_url(picture(3, *size))))
    assert reply.status_code in (200, 400)
    assert is_clean(reply.text)
    assert server.chat().status_code == 200


def test_row_10_an_empty_picture_is_a_clear_error(server: Running) -> None:
    reply = ask(server, image_part("data:image/png;base64,"))
    assert reply.status_code == 400
    assert "0 bytes" in reply.json()["error"]["message"]


def test_row_11_orientation_and_transparency_count_once(server: Running) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = ask(server, image_part(as_url(picture(4, 96, 32), "JPEG", exif=exif.tobytes())))
    see_through = picture(4, 64, 64).convert("RGBA")
    see_through.putalpha(99)
    clear = ask(server, image_part(as_url(see_through)))
    assert turned.status_code == clear.status_code == 200
    assert (turned.json()["images"][0]["width"], turned.json()["images"][0]["height"]) == (32, 96)


def test_row_12_many_placeholders_are_refused_in_linear_time(server: Running) -> None:
    started = time.monotonic()
    reply = server.chat("<|vision_start|><|image_pad|><|vision_end|>" * 100_000)
    assert reply.status_code == 400
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regex", "(a+)+$"),
        ("grammar", 'start: "a"'),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ],
)
def test_row_13_a_form_is_enforced_or_refused_by_name(
    server: Running, field: str, value: Any
) -> None:
    reply = ask(server, **{field: value})
    assert reply.status_code in (200, 400, 501)
    if reply.status_code != 200:
        assert reply.json()["error"]["param"].startswith(field)


def test_row_15_a_request_cannot_bring_a_template(server: Running) -> None:
    for fields in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "x"}}):
        reply = server.chat(**fields)
        assert reply.status_code == 400
        assert "chat_template" in reply.json()["error"]["param"]


def test_row_15_an_allowed_template_cannot_run_code_or_for_ever(checkpoint: Path) -> None:
    with serving(checkpoint, allow_request_templates=True) as running:
        running.ready()
        plain = running.chat(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
        assert plain.status_code == 200
        evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        endless = "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"
        for template in (evil, endless):
            reply = running.chat(chat_template=template)
            assert reply.status_code == 400
            assert is_clean(reply.text)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"n": 10**6}, 400),
        ({"stop": ["a"] * 1000}, 400),
        ({"stop": "a" * 10_000}, 400),
        ({"logprobs": True, "top_logprobs": 10**6}, 400),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, 400),
        ({"logit_bias": {"999999": 1}}, 400),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, 400),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 300}, 400),
        ({"max_tokens": 10**12}, 400),
        ({"model": "m" * 10_000}, 400),
    ],
)
def test_row_16_every_count_has_a_cap(server: Running, fields: dict[str, Any], status: int) -> None:
    assert server.chat(**fields).status_code == status


def test_row_16_a_body_over_the_limit_is_refused_unread(checkpoint: Path) -> None:
    with serving(None, max_body_bytes=1000) as running:
        reply = running.client.post("/v1/chat/completions", content=b" " * 5000)
        assert reply.status_code == 413
        assert "--max-body-bytes" in reply.json()["error"]["message"]
        pieces = iter([b" " * 600] * 4)  # chunked: no length is stated
        assert running.client.post("/v1/chat/completions", content=pieces).status_code == 413


def raw(server: Running, request: bytes) -> bytes:
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=10) as sock:
        parts = []
        with contextlib.suppress(OSError):  # closed on us: also an answer
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(65536):
                parts.append(part)
    return b"".join(parts)


def test_row_16_headers_have_a_cap(server: Running) -> None:
    start = b"GET /version HTTP/1.1\r\nhost: localhost\r\n"
    reply = raw(server, start + b"x: " + b"a" * 200_000 + b"\r\n\r\n")
    assert reply == b"" or reply.startswith(b"HTTP/1.1 4")
    wrong = b"POST /unload HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n"
    assert raw(server, wrong).startswith(b"HTTP/1.1 400")
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("field", ["max_tokens", "top_k", "n", "top_logprobs", "thinking_budget"])
def test_row_21_negative_counts_are_refused(server: Running, field: str) -> None:
    reply = server.chat(**{field: -2})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc", "a/../../b", "C:\\x", "org/..", "a--b/c", "org/model\x00", "."]
)
def test_row_22_a_models_name_is_no_path(server: Running, name: str) -> None:
    for path in ("/load", "/v1/chat/completions"):
        body = {"model": name, "messages": [{"role": "user", "content": "x"}]}
        reply = server.post(path, {"model": name} if path == "/load" else body)
        assert reply.status_code == 404
        assert is_clean(reply.text)


def test_row_22_local_files_stay_under_the_media_root(
    server: Running, media_root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.png"
    picture(5, 32, 32).save(outside)
    (media_root / "link.png").symlink_to(outside)
    for url in (
        str(outside),
        f"file://{outside}",
        "link.png",
        f"../{tmp_path.name}/outside.png",
        f"{media_root}/../{tmp_path.name}/outside.png",
        "file:///etc/passwd",
    ):
        reply = ask(server, image_part(url))
        assert reply.status_code == 400
        assert "--media-root" in reply.json()["error"]["message"]


def test_row_22_without_a_media_root_no_file_is_read(keyed: Running, media_root: Path) -> None:
    reply = ask(keyed, image_part(str(media_root / "inside.png")))
    assert reply.status_code == 400


def test_row_23_a_truncated_picture_is_a_clear_error(server: Running) -> None:
    whole = base64.b64decode(as_url(picture(6, 64, 64)).partition(",")[2])
    for size in (10, 60, len(whole) // 2, len(whole) * 3 // 4):
        data = base64.b64encode(whole[:size]).decode()
        reply = ask(server, image_part(f"data:image/png;base64,{data}"))
        assert reply.status_code in (400, 415)
        assert is_clean(reply.text)


def test_row_24_many_pictures_fill_no_more_than_their_cache(checkpoint: Path) -> None:
    with serving(checkpoint, media_cache=2**16) as running:
        running.ready()
        for i in range(40):
            url = as_url(Image.new("RGB", (64, 64), (i, 0, 0)))
            assert ask(running, image_part(url), max_tokens=1).status_code == 200
        stats = running.service.manager.loaded[0].engine.stats()
        assert stats["encoded_misses"] == 40
        assert 0 < stats["encoded_bytes"] <= 2**16


def test_row_25_a_neighbours_large_picture_does_not_stop_a_text(server: Running) -> None:
    large = as_url(picture(7, 3840, 2160), "JPEG")
    body = {"messages": [{"role": "user", "content": "go on"}], "stream": True}
    body |= {"max_tokens": 100_000, "ignore_eos": True}
    with (
        server.client.stream("POST", "/v1/chat/completions", json=body) as stream,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        lines = stream.iter_lines()
        next(lines)
        asked = pool.submit(ask, server, image_part(large), max_tokens=1)
        during = 0
        while not asked.done():
            during += bool(next(lines))
        assert asked.result().status_code == 200
    assert during > 10


def test_row_28_a_modality_the_model_lacks_is_named(server: Running) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    reply = ask(server, sound)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert "audio" in message
    assert "image" in message


def test_row_29_stops_and_seeds_hold_with_pictures(server: Running, data_url: str) -> None:
    fields = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    text = ask(server, image_part(data_url), **fields).json()["choices"][0]["message"]["content"]
    stop = text[3]
    reply = ask(server, image_part(data_url), **fields, stop=stop).json()["choices"][0]
    assert reply["message"]["content"] == text[: text.index(stop)]
    assert reply["finish_reason"] == "stop"


def test_a_failed_request_leaves_the_others_alone(server: Running, data_url: str) -> None:
    good = server.chat("steady").json()["choices"]
    for body in ({"messages": 1}, {"messages": [{"role": "user", "content": "x"}], "n": 0}):
        assert server.post("/v1/chat/completions", body).status_code == 400
    assert ask(server, image_part("data:image/png;base64,xx")).status_code == 415
    assert server.chat("steady").json()["choices"] == good


def test_options_that_only_the_family_can_judge_are_400(server: Running, data_url: str) -> None:
    for value in ({"max_pixels": "many"}, {"unknown_option": 1}, {"max_pixels": [1, [2]]}):
        reply = ask(server, image_part(data_url), processor_kwargs=value)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith("processor_kwargs")
    wait_for(server.is_quiet)


def test_keys_never_reach_the_log(keyed: Running, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logger = logging.getLogger("opsin.access")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "opsin.access")
    try:
        assert keyed.chat().status_code == 200
        wait_for(lambda: bool(caplog.records))
    finally:
        logger.removeHandler(caplog.handler)
    line = caplog.records[-1].getMessage()
    assert keyed.client.headers["authorization"].split()[1] not in line
    assert json.loads(line)["status"] == 200
