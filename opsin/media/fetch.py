"""Fetches media over http(s): the one module that opens a socket, and only to a checked address."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin

import httpcore

from opsin.errors import MediaError, MediaTimeout
from opsin.media.address import Address, WebURL, domain_allowed, parse_url, refusal
from opsin.media.failure import reason, source_name
from opsin.media.limits import FLAGS, Deadline, MediaLimits

MAX_REDIRECTS = 5
CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSPORT_ERRORS = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A body, the URL that it came from in the end, and what its server said of keeping it.

    etag and modified are "" where it sent none; fresh_seconds is None where it does not say how
    long the body stays the same.
    """

    body: bytes
    url: str
    etag: str = ""
    modified: str = ""
    storable: bool = True
    fresh_seconds: float | None = None


def fetch(url: str, limits: MediaLimits, deadline: Deadline) -> bytes:
    """The body behind an http(s) URL: see `fetch_unless_same`."""
    return fetch_unless_same(url, limits, deadline).body


def fetch_unless_same(
    url: str, limits: MediaLimits, deadline: Deadline, known: Fetched | None = None
) -> Fetched:
    """The body behind an http(s) URL, that of `known` where the server says it has not changed.

    Every hop is parsed once, its host resolved once, the addresses checked, and one of those
    connected to; certificate and Host header are the name's. No cookie, token or proxy is used.
    Raises MediaError (refused, failed, or an error status), MediaTooLarge or MediaTimeout.
    """
    what = source_name(url, "media")
    current = parse_url(url)
    backend = _CheckedBackend(limits, deadline, what)
    timeout = {"connect": CONNECT_SECONDS, "read": READ_SECONDS, "write": READ_SECONDS, "pool": 1.0}
    with httpcore.ConnectionPool(ssl_context=_tls(), network_backend=backend) as pool:
        for _ in range(MAX_REDIRECTS + 1):
            _check_domain(current, limits, what)
            try:
                with pool.stream(
                    "GET",
                    _core_url(current),
                    headers=_headers(current, known),
                    extensions={"timeout": timeout},
                ) as response:
                    if known is not None and response.status == HTTPStatus.NOT_MODIFIED:
                        return _renewed(known, current, response)
                    if response.status not in _REDIRECTS:
                        body = _body(response, limits, deadline, what)
                        return _described(body, current, response)
                    current = _next_hop(response, current, what)
            except httpcore.TimeoutException:
                raise _timed_out(deadline, what) from None
            except _TRANSPORT_ERRORS as error:
                raise MediaError(
                    f"{what} was not fetched",
                    why=reason(error),
                    remedy="Check the URL and its host",
                ) from None
    raise MediaError(
        f"{what} was not fetched",
        why=f"it redirects more than {MAX_REDIRECTS} times",
        remedy="Give the final URL",
    )


def _core_url(url: WebURL) -> httpcore.URL:
    host = f"[{url.host}]" if ":" in url.host else url.host
    return httpcore.URL(
        scheme=url.scheme.encode(), host=host.encode(), port=url.port, target=url.target.encode()
    )


def _headers(url: WebURL, known: Fetched | None) -> list[tuple[bytes, bytes]]:
    # Compressed transfer is not asked for: a small body could unpack to any size.
    headers = [
        (b"Host", url.netloc.encode()),
        (b"User-Agent", b"opsin"),
        (b"Accept", b"image/*, audio/*, video/*, */*;q=0.5"),
        (b"Accept-Encoding", b"identity"),
    ]
    if known is not None and known.url == str(url):  # nobody else hears of its validators
        if known.etag:
            headers.append((b"If-None-Match", known.etag.encode()))
        if known.modified:
            headers.append((b"If-Modified-Since", known.modified.encode()))
    return headers


def _described(body: bytes, url: WebURL, response: httpcore.Response) -> Fetched:
    """A body with what its response says of keeping it (RFC 9111)."""
    said = _header(response, b"cache-control").lower()
    words = {part.strip() for part in said.split(",")}
    ages = [word[8:].strip('"') for word in words if word.startswith("max-age=")]
    fresh = next((float(age[:9]) for age in ages if age.isdecimal()), None)
    return Fetched(
        body,
        str(url),
        _validator(response, b"etag"),
        _validator(response, b"last-modified"),
        "no-store" not in words and _header(response, b"vary") != "*",
        0.0 if "no-cache" in words else fresh,
    )


def _renewed(known: Fetched, url: WebURL, response: httpcore.Response) -> Fetched:
    """What is known, with what a server says of it that it did not say before."""
    now = _described(known.body, url, response)
    said = bool(_header(response, b"cache-control"))
    return Fetched(
        known.body,
        now.url,
        now.etag or known.etag,
        now.modified or known.modified,
        now.storable if said else known.storable,
        now.fresh_seconds if said else known.fresh_seconds,
    )


def _validator(response: httpcore.Response, name: bytes) -> str:
    """A header that may be sent back as it came, "" where it is none of the plain ones."""
    value = _header(response, name)
    return value if len(value) <= 200 and value.isascii() and value.isprintable() else ""


def _header(response: httpcore.Response, name: bytes) -> str:
    for key, value in response.headers:
        if key.lower() == name:
            return value.decode("utf-8", "replace").strip()
    return ""


def _next_hop(response: httpcore.Response, current: WebURL, what: str) -> WebURL:
    location = _header(response, b"location")
    if not location:
        raise MediaError(
            f"{what} was not fetched",
            why=f"the server answered {response.status} without saying where to go",
            remedy="Give the final URL",
        )
    return parse_url(urljoin(str(current), location))


def _body(response: httpcore.Response, limits: MediaLimits, deadline: Deadline, what: str) -> bytes:
    if response.status not in (200, 203):
        phrases = {status.value: f" {status.phrase}" for status in HTTPStatus}
        raise MediaError(
            f"{what} was not fetched",
            why=f"the server answered {response.status}{phrases.get(response.status, '')}",
            remedy="Check that the URL is right and open to everyone",
        )
    encoding = _header(response, b"content-encoding").lower()
    if encoding not in ("", "identity"):
        raise MediaError(
            f"{what} was not fetched",
            why=f"the server sent it with content-encoding {encoding[:20]}, unasked",
            remedy="Download it and give the file",
        )
    length = _header(response, b"content-length")
    if length.isdecimal():
        limits.check("max_bytes", int(length[:20]), what, "bytes")
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        deadline.check(what)
        if len(body) > limits.max_bytes:
            raise limits.exceeded("max_bytes", what, f"over {limits.max_bytes:,} bytes", "bytes")
    return bytes(body)


def _check_domain(url: WebURL, limits: MediaLimits, what: str) -> None:
    if domain_allowed(url.host, limits.allowed_domains):
        return
    raise MediaError(
        f"{what} was not fetched",
        why=f"its host {url.host} is not an allowed domain",
        remedy=f"Use an allowed host, or add it to allowed_domains ({FLAGS['allowed_domains']})",
        param="allowed_domains",
    )


def _timed_out(deadline: Deadline, what: str) -> MediaTimeout:
    if deadline.remaining() <= 0.0:
        return deadline.expired(what)
    return MediaTimeout(
        f"{what} was not fetched",
        why=f"its host did not connect within {CONNECT_SECONDS:g} seconds, or sent nothing for "
        f"{READ_SECONDS:g}",
        remedy="Check the URL and its host",
    )


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a host: itself when it is one, else what the system's resolver says."""
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    texts = dict.fromkeys(str(entry[4][0]) for entry in found)
    return [ipaddress.ip_address(text.partition("%")[0]) for text in texts]


def checked_addresses(host: str, port: int, limits: MediaLimits, what: str) -> list[Address]:
    """The host's addresses; MediaError if there is none or any of them is not public."""
    try:
        addresses = resolve(host, port)
    except (OSError, UnicodeError):
        raise MediaError(
            f"{what} was not fetched",
            why=f"the host name {host} does not resolve",
            remedy="Check the URL and this machine's network",
        ) from None
    for address in addresses:
        why = refusal(address)
        if why is not None and not limits.allow_private_addresses:
            # The address itself stays unsaid: it would map the operator's network.
            raise MediaError(
                f"{what} was not fetched",
                why=f"its host {host} leads to {why}, not to the public internet",
                remedy="Give a public URL or send the bytes; an operator can open private networks "
                f"with {FLAGS['allow_private_addresses']}",
                param="allow_private_addresses",
            )
    return addresses


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to addresses that were checked, by address, so that no second look-up can differ."""

    def __init__(self, limits: MediaLimits, deadline: Deadline, what: str) -> None:
        self.limits = limits
        self.deadline = deadline
        self.what = what

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception | None = None
        for address in checked_addresses(host.strip("[]"), port, self.limits, self.what):
            self.deadline.check(self.what)
            try:
                return _connected(address, port, timeout, self.deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore.ConnectError("the host has no address")


def _connected(
    address: Address, port: int, timeout: float | None, deadline: Deadline
) -> _Connection:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        with _wait(sock, deadline, timeout, httpcore.ConnectTimeout, httpcore.ConnectError):
            sock.connect((str(address), port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return _Connection(sock, deadline)


class _Connection(httpcore.NetworkStream):
    """A connection whose every wait ends at the deadline, however slowly bytes drip in."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _wait(self._sock, self._deadline, timeout, httpcore.ReadTimeout, httpcore.ReadError):
            return self._sock.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _wait(self._sock, self._deadline, timeout, httpcore.WriteTimeout, httpcore.WriteError):
            self._sock.sendall(buffer)

    def close(self) -> None:
        self._sock.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        late, failed = httpcore.ConnectTimeout, httpcore.ConnectError
        try:
            # The handshake apart, since wrapping makes another socket of this one.
            self._sock = sock = ssl_context.wrap_socket(
                self._sock, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            with _wait(sock, self._deadline, timeout, late, failed):
                sock.do_handshake()
        except BaseException:
            self.close()
            raise
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object" and isinstance(self._sock, ssl.SSLSocket):
            return self._sock
        # An idle connection that can be read from has been closed: none is used for a second hop.
        return True if info == "is_readable" else None


@contextmanager
def _wait(
    sock: socket.socket,
    deadline: Deadline,
    timeout: float | None,
    late: type[httpcore.TimeoutException],
    failed: type[httpcore.NetworkError],
) -> Iterator[None]:
    """One wait for a socket, its end and its failures as httpcore's; cancelling hangs up."""
    left = deadline.remaining()
    if left <= 0.0:
        raise late("the deadline has passed")
    try:
        with deadline.cancellation.ending(lambda: _hang_up(sock)):
            sock.settimeout(left if timeout is None else min(timeout, left))
            yield
    except TimeoutError:
        raise late("it took too long") from None
    except OSError as error:
        if not deadline.cancellation.cancelled:
            raise failed(error) from error
    if deadline.cancellation.cancelled:  # what looks like the end of a body is none
        raise late("nobody waits for it")


def _hang_up(sock: socket.socket) -> None:
    """Wake whoever waits for a socket, which stays theirs to close."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS would say goodbye first
