"""Leaving clients, full queues, deadlines, models coming and going, and the end of the process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from opsin import api
from opsin.cli.serve import serve
from opsin.errors import CheckpointError, OpsinError
from opsin.media.limits import Deadline, MediaLimits
from opsin.media.worker import WORKERS
from opsin.server.health import Heart
from opsin.server.manager import Source

from .running import Running, serving, wait_for

LONG = {"max_tokens": 5000, "ignore_eos": True}


@contextlib.contextmanager
def hanging_host() -> Iterator[str]:
    """A host that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"


def leave_after(running: Running, body: dict, first: int) -> None:
    """Ask, read `first` chunks, and close the connection."""
    with running.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(first):
            next(lines)


def chat_body(**fields: object) -> dict:
    return {"messages": [{"role": "user", "content": "go on"}], **LONG, **fields}


def test_row_30_a_client_that_leaves_a_stream_ends_its_work(server: Running) -> None:
    engine = server.service.manager.loaded[0].engine
    leave_after(server, chat_body(stream=True), 3)
    wait_for(server.is_quiet, 5)
    assert engine.stats()["running"] == 0


def test_row_30_a_client_that_leaves_without_a_stream_ends_its_work(server: Running) -> None:
    running = server.service.manager.loaded[0].engine.stats
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(
            "/v1/chat/completions", json=chat_body(), timeout=httpx.Timeout(10, read=0.2)
        )
    wait_for(server.is_quiet, 5)
    assert running()["running"] == 0


def test_row_30_a_client_that_leaves_while_media_are_fetched(checkpoint: Path) -> None:
    with serving(checkpoint, allow_private_media=True, media_timeout=2) as running:
        running.ready()
        with hanging_host() as url:
            part = {"type": "image_url", "image_url": {"url": url}}
            body = chat_body(messages=[{"role": "user", "content": [part]}])
            with pytest.raises(httpx.ReadTimeout):
                running.client.post(
                    "/v1/chat/completions", json=body, timeout=httpx.Timeout(10, read=0.2)
                )
            wait_for(running.is_quiet, 1)
            reply = running.post("/v1/chat/completions", body)
            assert reply.status_code == 408
            assert "--media-timeout" in reply.json()["error"]["message"]


@contextlib.contextmanager
def dripping_host() -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """A host whose picture never ends, what says that one was asked for, and that it was left."""
    asked, left = threading.Event(), threading.Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n\x89PNG")
            asked.set()
            connection.settimeout(60)
            connection.recv(1)  # returns when the other side hangs up
        left.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/x.png", asked, left
    thread.join(10)


ROUTES_WITH_MEDIA = {
    "chat": ("/v1/chat/completions", {"type": "image_url"}),
    "stream": ("/v1/chat/completions", {"type": "image_url"}),
    "count": ("/v1/messages/count_tokens", {"type": "image"}),
}


@pytest.mark.parametrize("route", ROUTES_WITH_MEDIA)
def test_row_30_a_client_that_leaves_ends_its_download(checkpoint: Path, route: str) -> None:
    """Long before --media-timeout: the host is hung up on, and no thread goes on waiting."""
    path, part = ROUTES_WITH_MEDIA[route]
    with (
        serving(checkpoint, allow_private_media=True, media_timeout=300) as running,
        dripping_host() as (url, asked, left),
        socket.create_connection(("127.0.0.1", running.ready().server.port), 20) as client,
    ):
        place = {"source": {"type": "url", "url": url}} if route == "count" else {}
        part = {**part, **(place or {"image_url": {"url": url}})}
        fields: dict = {"messages": [{"role": "user", "content": [part]}], "model": "default"}
        if route != "count":
            fields["stream"] = route == "stream"
        body = json.dumps(fields).encode()
        client.sendall(
            b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % (path.encode(), len(body)) + body
        )
        assert asked.wait(30)
        client.close()
        assert left.wait(30)
        wait_for(running.is_quiet, 5)
        wait_for(lambda: not any(t.name == "opsin-media" for t in threading.enumerate()))
        assert WORKERS.left_behind() == 0


def test_row_30_a_client_that_leaves_ends_the_decoding(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that reads and reads is stopped at its next look; nothing after it is begun."""
    begun, ended = threading.Event(), threading.Event()

    def endless(source: object, limits: MediaLimits, deadline: Deadline) -> None:
        begun.set()
        try:
            while True:
                deadline.check("the picture")
        finally:
            ended.set()

    monkeypatch.setattr("opsin.media.image.decode_image", endless)
    with serving(checkpoint, media_timeout=300) as running:
        prepared = running.ready().service.manager.loaded[0].processor.prepared
        url = "data:image/png;base64,aGVsbG8="
        content = [{"type": "image_url", "image_url": {"url": url}}] * 3
        body = chat_body(messages=[{"role": "user", "content": content}])
        with pytest.raises(httpx.ReadTimeout):
            running.client.post(
                "/v1/chat/completions", json=body, timeout=httpx.Timeout(10, read=0.3)
            )
        assert begun.is_set()
        assert ended.wait(30)
        wait_for(running.is_quiet, 5)
        assert prepared.misses == 1


def test_row_30_a_thousand_cancelled_requests_leak_nothing(server: Running) -> None:
    engine = server.service.manager.loaded[0].engine
    before = engine.stats()["free_blocks"]
    threads = threading.active_count()
    address = ("127.0.0.1", server.server.port)
    body = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":500,"stream":true}'
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    ) + body

    def leave(i: int) -> None:
        with socket.create_connection(address, timeout=20) as sock:
            sock.sendall(request[: len(request) if i % 4 else i % len(request)])
            if i % 4 > 1:
                sock.recv(i % 700 + 1)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(1000)))
    wait_for(server.is_quiet, 20)
    assert engine.stats()["free_blocks"] == before
    wait_for(lambda: threading.active_count() <= threads + 12)
    engine.scheduler.check_integrity()
    assert server.chat().status_code == 200


def test_row_30_a_full_queue_answers_429(checkpoint: Path) -> None:
    with serving(checkpoint, max_num_seqs=1, max_queue=1) as running:
        running.ready()
        asked = threading.Event()

        def hold() -> None:
            body = chat_body(stream=True)
            with running.client.stream("POST", "/v1/chat/completions", json=body):
                asked.wait(30)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            held = [pool.submit(hold) for _ in "ab"]
            wait_for(lambda: running.service.shop.admission.held == 2)
            reply = running.chat()
            asked.set()
            for job in held:
                job.result()
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["type"] == "rate_limit_error"
        wait_for(running.is_quiet)
        assert running.chat().status_code == 200


def test_more_answers_than_places_wait_their_turn(checkpoint: Path) -> None:
    with serving(checkpoint, max_num_seqs=2, max_queue=4) as running:
        reply = running.ready().chat(n=6)
        assert len(reply.json()["choices"]) == 6


def test_a_request_over_its_time_is_ended(checkpoint: Path) -> None:
    with serving(checkpoint, timeout=0.3) as running:
        running.ready()
        reply = running.post("/v1/chat/completions", chat_body(max_tokens=100_000))
        assert reply.status_code == 504
        assert "--timeout" in reply.json()["error"]["message"]
        body = chat_body(stream=True, max_tokens=100_000)
        reply = running.post("/v1/chat/completions", body)
        assert '"code":"timeout"' in reply.text
        assert reply.text.endswith("data: [DONE]\n\n")
        wait_for(running.is_quiet, 5)


def test_a_wrong_name_is_404_and_unloads_nothing(server: Running) -> None:
    before = server.service.manager.loaded[0]
    assert server.chat(model="gpt-99").status_code == 404
    assert server.post("/load", {"model": "nobody/nothing"}).status_code == 404
    assert server.post("/unload", {"model": "nobody/nothing"}).status_code == 404
    assert server.service.manager.loaded == [before]
    for name in ("default", "tiny-vl"):
        assert server.chat(model=name).json()["model"] == "tiny-vl"


def test_names_that_a_model_is_served_under(checkpoint: Path) -> None:
    with serving(checkpoint, served_model_name=("eyes", "also")) as running:
        running.ready()
        for name in ("eyes", "also", str(checkpoint), "default"):
            assert running.chat(model=name).json()["model"] == "eyes"
        assert running.client.get("/v1/models").json()["data"][0]["id"] == "eyes"


def test_unloading_gives_the_memory_back_and_loads_again_on_demand(checkpoint: Path) -> None:
    with serving(checkpoint) as running:
        running.ready()
        loaded = running.service.manager.loaded[0]
        gone = [
            weakref.ref(loaded.model),
            weakref.ref(loaded.engine),
            weakref.ref(loaded.engine.cache),
        ]
        before = running.chat().json()["choices"]
        del loaded
        reply = running.post("/unload", {})
        assert reply.json()["id"] == "tiny-vl"
        gc.collect()
        assert [ref() for ref in gone] == [None, None, None]
        assert running.client.get("/v1/models").json()["data"][0]["loaded"] is False
        assert running.post("/unload", {}).status_code == 404
        assert running.chat().json()["choices"] == before
        assert running.post("/load", {"model": "default"}).json()["loaded"] is True


def test_unloading_waits_for_the_requests_of_the_model(checkpoint: Path) -> None:
    with serving(checkpoint) as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running.ready()
        body = chat_body(max_tokens=150)
        asked = pool.submit(running.post, "/v1/chat/completions", body)
        engine = running.service.manager.loaded[0].engine
        wait_for(lambda: engine.stats()["running"] == 1)
        assert running.post("/unload", {}).status_code == 200
        assert asked.result().json()["usage"]["completion_tokens"] == 150


def test_an_idle_model_is_unloaded_after_its_time(checkpoint: Path) -> None:
    with serving(checkpoint, unload_after=0.2) as running:
        running.ready()
        assert running.chat().status_code == 200
        wait_for(lambda: not running.service.manager.loaded)
        assert running.chat().status_code == 200


def test_a_client_that_leaves_while_a_model_loads_loses_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engines() -> int:
        return sum(thread.name == "opsin-engine" for thread in threading.enumerate())

    before = engines()
    go = threading.Event()
    original = api.load

    def slow(*given: object, **options: object) -> object:
        go.wait(20)
        return original(*given, **options)

    monkeypatch.setattr("opsin.server.manager.api.load", slow)
    with serving(None) as running:
        monkeypatch.setattr(running.service.manager, "_own", lambda: Source(str(checkpoint), "own"))
        monkeypatch.setattr("opsin.server.manager._resolved", lambda source: checkpoint)
        with pytest.raises(httpx.ReadTimeout):
            running.client.post(
                "/v1/chat/completions", json=chat_body(), timeout=httpx.Timeout(10, read=0.2)
            )
        go.set()
        wait_for(lambda: len(running.service.manager.loaded) == 1)
        assert running.chat().json()["model"] == "own"
    assert engines() == before


def test_a_failed_load_leaves_the_loaded_model_serving(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoint) as running:
        running.ready()
        before = running.chat().json()["choices"]

        def broken(*_: object, **__: object) -> None:
            raise CheckpointError("That checkpoint is broken")

        with monkeypatch.context() as patch:
            patch.setattr("opsin.server.manager.api.load", broken)
            patch.setattr("opsin.server.manager._is_cached", lambda name: True)
            patch.setattr("opsin.server.manager._resolved", lambda source: checkpoint)
            reply = running.chat(model="org/broken")
            assert reply.status_code == 422
            assert running.chat().json()["choices"] == before
            assert running.chat().json()["model"] == "tiny-vl"


def test_two_models_serve_when_both_are_wanted(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoint, max_models=2) as running:
        running.ready()
        monkeypatch.setattr("opsin.server.manager._is_cached", lambda name: True)
        monkeypatch.setattr("opsin.server.manager._resolved", lambda source: checkpoint)
        assert running.chat(model="org/other").json()["model"] == "org/other"
        assert running.chat(model="tiny-vl").json()["model"] == "tiny-vl"
        assert len(running.service.manager.loaded) == 2
        assert running.chat(model="org/third").json()["model"] == "org/third"
        names = {model.name for model in running.service.manager.loaded}
        assert names == {"tiny-vl", "org/third"}


def test_an_engine_that_has_ended_is_noticed_and_replaced(checkpoint: Path) -> None:
    with serving(checkpoint) as running:
        running.ready()
        before = running.chat().json()["choices"]
        running.service.manager.loaded[0].engine.close()
        reply = running.client.get("/health")
        assert (reply.status_code, reply.json()["status"]) == (503, "failing")
        assert running.chat().json()["choices"] == before
        assert running.client.get("/health").status_code == 200


def test_health_fails_when_an_engine_with_work_takes_no_step(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart = Heart(server.service.manager, stall_seconds=0.0)
    engine = server.service.manager.loaded[0].engine
    frozen = {**engine.stats(), "running": 1}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "stats", lambda: frozen)
        assert heart.ailing() is None  # the first look only takes the pulse
        assert "no step" in (heart.ailing() or "")
    assert heart.ailing() is None


class PictureHost(http.server.BaseHTTPRequestHandler):
    """Answers 418 to everything."""

    def do_GET(self) -> None:
        self.send_error(418)

    def log_message(self, *args: object) -> None:
        pass


def test_row_26_a_failed_download_is_no_500(checkpoint: Path) -> None:
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), PictureHost) as host,
        serving(checkpoint, allow_private_media=True) as running,
    ):
        threading.Thread(target=host.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{host.server_address[1]}/x.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        reply = running.ready().post(
            "/v1/chat/completions", chat_body(messages=[{"role": "user", "content": [part]}])
        )
        host.shutdown()
        assert 400 <= reply.status_code < 500
        assert "418" in reply.json()["error"]["message"]


class Process:
    """`opsin serve` as a process of its own."""

    def __init__(self, checkpoint: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "opsin", "serve", str(checkpoint), "--port", "0"]
        command += ["--host", "127.0.0.1", "--memory", "16MB", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if " at http://" in line:
                break
        self.url = line.partition(" at ")[2].strip().removesuffix("/v1")
        threading.Thread(target=self._read, daemon=True).start()
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self.client.headers["x-api-key"] = "k"
        wait_for(lambda: self.client.get("/ready").status_code == 200)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def start_stream(self, tokens: int) -> tuple[contextlib.ExitStack, Iterator[str]]:
        """A stream that has begun."""
        stack = contextlib.ExitStack()
        body = chat_body(stream=True, max_tokens=tokens)
        reply = stack.enter_context(self.client.stream("POST", "/v1/chat/completions", json=body))
        lines = reply.iter_lines()
        next(lines)
        return stack, lines


def test_row_30_sigterm_drains_and_exits_with_0(checkpoint: Path) -> None:
    process = Process(checkpoint)
    stack, lines = process.start_stream(400)
    process.process.send_signal(signal.SIGTERM)
    with stack:
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert not any('"error"' in line for line in rest)
    assert process.process.wait(20) == 0
    assert any("only clients on this machine" in line for line in process.lines)


def test_row_30_a_second_sigterm_aborts(checkpoint: Path) -> None:
    process = Process(checkpoint, "--api-key", "k")
    stack, lines = process.start_stream(200_000)
    process.process.send_signal(signal.SIGTERM)
    wait_for(lambda: not _listens(process.url))
    assert process.process.poll() is None
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(20) == 143
    with pytest.raises(httpx.HTTPError), stack:
        list(lines)


def _listens(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"model": "no/such-model-here"}, 3, "was not found"),
        ({"port": "x"}, 2, "--port"),
        ({"config": "nothing.yaml"}, 2, "nothing.yaml"),
        ({"api_key": [""]}, 2, "--api-key"),
        ({"host": "203.0.113.7", "port": "1"}, 6, "cannot listen"),
        ({"words": ["a", "b"]}, 2, "More than one model"),
    ],
)
def test_what_keeps_a_server_from_serving_is_one_line(given: dict, code: int, words: str) -> None:
    flags = {"host": "127.0.0.1", "port": "0", **given}
    with pytest.raises(OpsinError, match=words) as caught:
        serve(flags.pop("words", None), flags.pop("config", None), flags)
    assert caught.value.exit_code == code
