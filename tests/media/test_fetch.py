"""Fetching over http against a loopback server, and every way it must refuse."""

import ipaddress
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from opsin.errors import MediaError, MediaTimeout, MediaTooLarge
from opsin.media import fetch as fetch_module
from opsin.media.cancellation import Cancellation
from opsin.media.fetch import fetch
from opsin.media.image import load_image
from opsin.media.limits import Deadline, MediaLimits
from tests.media.samples import LOOPBACK, picture, reply, saved, web_server


def get(url, limits=LOOPBACK, seconds=10.0):
    return fetch(url, limits, Deadline(seconds))


@pytest.fixture
def connections(monkeypatch):
    """Every address that a connection was tried to; none is really opened."""
    tried = []

    class Closed(socket.socket):
        def connect(self, address):
            tried.append(address[0])
            raise ConnectionRefusedError("closed by the test")

    monkeypatch.setattr(fetch_module.socket, "socket", Closed)
    return tried


def test_a_picture_is_fetched_and_decoded():
    data = saved(picture(), "PNG")
    with web_server(lambda handler: reply(handler, data)) as url:
        assert load_image(f"{url}/a.png", LOOPBACK).size == (32, 24)


def test_the_request_names_the_host_and_carries_no_token_or_cookie(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    seen = []

    def answer(handler):
        seen.append(dict(handler.headers))
        reply(handler, b"x", Set_Cookie="a=b")

    with web_server(answer) as url:
        get(url)
        get(url)
    assert [set(headers) for headers in seen] == [
        {"Host", "User-Agent", "Accept", "Accept-Encoding"}
    ] * 2
    assert seen[0]["Host"] == url.removeprefix("http://")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "LOCALHOST.", "127.0.0.1.", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_row_02_loopback_is_refused_without_the_operators_leave(host, connections):
    with pytest.raises(MediaError, match="not to the public internet"):
        get(f"http://{host}:1/", MediaLimits())
    assert connections == []


@pytest.mark.parametrize(
    "answer",
    ["10.0.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "0.0.0.0", "::1", "fe80::1",
     "fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1", "2001::1"],
)  # fmt: skip
def test_row_02_names_that_resolve_to_private_addresses_are_refused(
    answer, connections, monkeypatch
):
    both = [ipaddress.ip_address("8.8.8.8"), ipaddress.ip_address(answer)]
    monkeypatch.setattr(fetch_module, "resolve", lambda host, port: both)
    with pytest.raises(MediaError, match="not to the public internet") as caught:
        get("http://rebind.example/", MediaLimits())
    assert connections == []
    assert answer not in caught.value.line()
    assert caught.value.status == 400


def test_row_02_the_checked_address_is_the_one_connected_to(connections, monkeypatch):
    lookups = []

    def resolve(host, port):
        lookups.append(host)
        return [ipaddress.ip_address("8.8.8.8" if len(lookups) == 1 else "10.0.0.1")]

    monkeypatch.setattr(fetch_module, "resolve", resolve)
    with pytest.raises(MediaError):
        get("http://rebind.example/", MediaLimits())
    assert (lookups, connections) == (["rebind.example"], ["8.8.8.8"])


def test_row_02_each_redirect_is_checked_again(monkeypatch):
    opened = {"first.example": "127.0.0.1"}
    monkeypatch.setattr(
        fetch_module,
        "resolve",
        lambda host, port: [ipaddress.ip_address(opened.get(host, "169.254.169.254"))],
    )
    real = fetch_module.refusal
    loopback = ipaddress.ip_address("127.0.0.1")
    monkeypatch.setattr(
        fetch_module, "refusal", lambda address: None if address == loopback else real(address)
    )
    target = "http://metadata.example/latest/"
    with web_server(lambda handler: reply(handler, status=302, Location=target)) as url:
        port = url.rpartition(":")[2]
        with pytest.raises(MediaError, match="link-local"):
            get(f"http://first.example:{port}/", MediaLimits())


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://a.example/", "http://ok\\@evil.example/", "data:,x"]
)
def test_row_02_a_redirect_may_only_lead_to_http(location):
    with (
        web_server(lambda handler: reply(handler, status=302, Location=location)) as url,
        pytest.raises(MediaError, match="was not fetched"),
    ):
        get(url)


def test_row_02_at_most_five_redirects():
    seen = []

    def answer(handler):
        seen.append(handler.path)
        number = int(handler.path[1:])
        if number == 0:
            reply(handler, b"done")
        else:
            reply(handler, status=307, Location=f"/{number - 1}")

    with web_server(answer) as url:
        assert get(f"{url}/5") == b"done"
        assert len(seen) == 6
        with pytest.raises(MediaError, match="more than 5 times"):
            get(f"{url}/6")
    assert len(seen) == 12


def test_allowed_domains_hold_for_redirects_too():
    limits = replace(LOOPBACK, allowed_domains=("127.0.0.1",))

    def answer(handler):
        reply(handler, status=302, Location="http://other.example/")

    with (
        web_server(answer) as url,
        pytest.raises(MediaError, match=r"other\.example is not an allowed.*--allow-media-domain"),
    ):
        get(url, limits)


@pytest.mark.parametrize(
    ("status", "words"), [(404, "404 Not Found"), (403, "403"), (500, "500"), (204, "204")]
)
def test_row_26_the_error_names_the_urls_own_status(status, words):
    with (
        web_server(lambda handler: reply(handler, status=status)) as url,
        pytest.raises(MediaError, match=words) as caught,
    ):
        get(f"{url}/cat.png?token=secret")
    assert caught.value.status == 400
    assert f"{url}/cat.png" in caught.value.line()
    assert "secret" not in caught.value.line()


def test_a_stated_length_over_the_budget_is_refused_before_the_body():
    limits = replace(LOOPBACK, max_bytes=1000)
    with (
        web_server(lambda handler: reply(handler, Content_Length="1001")) as url,
        pytest.raises(MediaTooLarge, match=r"1,001 bytes.*1,000 bytes.*--max-media-bytes"),
    ):
        get(url, limits)


def test_an_unstated_length_is_cut_at_the_budget():
    sent = []

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(b"x" * 10_000)
            sent.append(10_000)

    with web_server(answer) as url, pytest.raises(MediaTooLarge, match="--max-media-bytes"):
        get(url, replace(LOOPBACK, max_bytes=100_000))
    assert sum(sent) < 50_000_000


def test_packed_bodies_are_refused():
    with (
        web_server(lambda handler: reply(handler, b"x", Content_Encoding="gzip")) as url,
        pytest.raises(MediaError, match="content-encoding gzip"),
    ):
        get(url)


@pytest.mark.parametrize("drip", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\nabc"])
def test_row_23_a_server_that_drips_is_left_at_the_deadline(drip):
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.sendall(drip)
                while not done.wait(0.02):
                    try:
                        connection.sendall(b"a")
                    except OSError:
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(MediaTimeout, match="--media-timeout"):
                get(f"http://127.0.0.1:{server.getsockname()[1]}/", seconds=0.4)
        finally:
            done.set()
            thread.join()


def test_a_closed_port_and_an_unknown_name_are_media_errors(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(MediaError, match="was not fetched"):
        get(f"http://127.0.0.1:{port}/")

    def unknown(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(fetch_module, "resolve", unknown)
    with pytest.raises(MediaError, match=r"nowhere\.example does not resolve"):
        get("http://nowhere.example/")


def test_garbage_instead_of_http_is_a_media_error():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(MediaError, match="was not fetched"):
            get(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join()


def test_tls_asks_for_the_name_while_connected_to_the_checked_address(monkeypatch):
    """The certificate is asked of and checked against the URL's host, not the pinned address."""
    names = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda connection, name, _: names.append(name)
    monkeypatch.setattr(
        fetch_module, "resolve", lambda host, port: [ipaddress.ip_address("127.0.0.1")]
    )
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                try:
                    context.wrap_socket(connection, server_side=True)
                except (ssl.SSLError, OSError):
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(MediaError, match="was not fetched"):
            get(f"https://pinned.example:{server.getsockname()[1]}/")
        thread.join()
    assert names == ["pinned.example"]
    client = fetch_module._tls()
    assert client.check_hostname
    assert client.verify_mode is ssl.CERT_REQUIRED


def full_host():
    """A port that answers no connection: its queue of one is full."""
    server = socket.create_server(("127.0.0.1", 0), backlog=0)
    return server, socket.create_connection(server.getsockname())


@pytest.mark.parametrize("stage", ["connect", "handshake", "head", "body"])
def test_row_30_cancelling_hangs_up_wherever_a_fetch_waits(stage):
    cancellation = Cancellation()
    deadline = Deadline(60.0, cancellation)
    waits = threading.Event()
    held = []

    def serve(server):
        connection, _ = server.accept()
        held.append(connection)
        connection.recv(1000)
        if stage == "body":
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nabc")  # its end is the connection's
        waits.set()

    if stage == "connect":
        server, other = full_host()
        held.append(other)
        waits.set()
    else:
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    scheme = "https" if stage == "handshake" else "http"
    url = f"{scheme}://127.0.0.1:{server.getsockname()[1]}/"
    with server, ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(fetch, url, LOOPBACK, deadline)
        assert waits.wait(20)
        cancellation.cancel()
        with pytest.raises(MediaTimeout, match="not wanted any more"):
            fetched.result(20)
    for connection in held:
        connection.close()


def test_row_30_what_was_cancelled_before_is_not_fetched(connections):
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(MediaTimeout, match="not wanted any more"):
        fetch("http://127.0.0.1:1/", LOOPBACK, Deadline(60.0, cancellation))
    assert connections == []


def test_row_03_text_around_a_url_is_never_searched_for_it(connections):
    """Only a source that is a URL from its first letter is fetched."""
    for text in ("![x](http://a.example/x.png)", "see http://a.example/x.png", "//a.example/x"):
        with pytest.raises(MediaError):
            load_image(text, LOOPBACK)
    assert connections == []
