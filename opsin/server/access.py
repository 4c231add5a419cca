"""Who may call: this machine alone without keys, a key's holder with them; no foreign web page."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from opsin.server.failures import Failure, Refused, error_body
from opsin.server.streams import JsonReply

OPEN_PATHS = ("/health",)
# A request with one of these came through a proxy: its peer address is not its client's.
PROXY_HEADERS = ("x-forwarded-for", "forwarded", "x-real-ip", "x-forwarded-host", "via")
LOCAL_NAMES = ("localhost", "ip6-localhost")


class Access:
    """The rules: keys (any that fits), origins of web pages that may call, names we answer to."""

    def __init__(
        self, keys: Iterable[str], origins: Iterable[str] = (), hosts: Iterable[str] = ()
    ) -> None:
        self._digests = [_digest(key) for key in keys]
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        self._hosts = {*LOCAL_NAMES, *(host.lower() for host in hosts)}

    @property
    def needs_key(self) -> bool:
        """Whether clients must send a key."""
        return bool(self._digests)

    def check(self, peer: str | None, headers: Headers) -> str:
        """Raise Refused unless the request may go on; returns who asks, "" for this machine."""
        self._check_page(headers)
        if self.needs_key:
            return self._check_key(headers)
        self._check_local(peer, headers)
        return ""

    def _check_page(self, headers: Headers) -> None:
        """A browser tells which page calls: refuse any but our own and those of --cors-origin."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin.rstrip("/").lower() in self._origins:
            return
        if urlsplit_host(origin) == headers.get("host", "").lower() and origin != "null":
            return
        raise Refused(
            403,
            "origin_not_allowed",
            "This web page may not call the server",
            why="its origin is not allowed",
            remedy="Start the server with --cors-origin and the page's origin",
        )

    def _check_key(self, headers: Headers) -> str:
        given = _given_key(headers)
        if given is None:
            raise Refused(
                401,
                "missing_api_key",
                "There is no API key in the request",
                remedy="Send Authorization: Bearer KEY, or x-api-key: KEY",
            )
        digest = _digest(given)
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise Refused(
                401,
                "invalid_api_key",
                "The API key is not one of this server's",
                remedy="Check the key",
            )
        return digest.hex()[:12]

    def _check_local(self, peer: str | None, headers: Headers) -> None:
        proxied = next((name for name in PROXY_HEADERS if name in headers), None)
        if not is_loopback(peer) or proxied is not None:
            why = "requests through a proxy" if is_loopback(peer) else "other addresses"
            raise Refused(
                401,
                "api_key_required",
                "This server only answers clients on its own machine",
                why=f"it was started without a key, so {why} are refused",
                remedy="Start it with --api-key KEY and send that key",
            )
        host = host_name(headers.get("host", ""))
        if host not in self._hosts and not is_loopback(host):
            # A foreign name that resolves to this machine: a page's way around the browser's rules.
            raise Refused(
                403,
                "host_not_allowed",
                "The Host header names another machine",
                remedy="Call localhost or 127.0.0.1, or start the server with --api-key, "
                "or --allowed-host and that name",
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given_key(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key") or None


def is_loopback(address: str | None) -> bool:
    """Whether an address is this machine's own, in whatever form it is written."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def host_name(host: str) -> str:
    """The name or address in a Host header, without its port and brackets."""
    text = host.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text


def urlsplit_host(origin: str) -> str:
    """The host and port of an origin, "" where it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


class Gate:
    """ASGI middleware that lets through what Access allows."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with the refusal."""
        if scope["type"] != "http":
            await (self.app(scope, receive, send) if scope["type"] == "lifespan" else _deny(send))
            return
        if scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        client = scope.get("client")
        try:
            who = self.access.check(client[0] if client else None, Headers(scope=scope))
        except Refused as error:
            failure = Failure.of(error)
            body = error_body(scope["path"], failure, request_id(scope))
            await JsonReply(body, failure.status, failure.headers)(scope, receive, send)
            return
        scope["state"]["key"] = who
        await self.app(scope, receive, send)


async def _deny(send: Send) -> None:
    """No route here is a web socket."""
    await send({"type": "websocket.close", "code": 1008})


def request_id(scope: Mapping[str, object]) -> str:
    """The id that the access log gave the request."""
    state = scope.get("state")
    return str(state.get("request_id", "")) if isinstance(state, dict) else ""
