"""Access rules, with and without keys."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from opsin.server.access import Access, host_name, is_loopback
from opsin.server.failures import Refused

from .conftest import KEY
from .running import Running, serving


def status(access: Access, peer: str | None, **headers: str) -> int:
    given = {"host": "localhost:8080"} | {k.replace("_", "-"): v for k, v in headers.items()}
    try:
        access.check(peer, Headers(given))
    except Refused as error:
        return error.own_status
    return 200


OPEN = Access(())
KEYED = Access((KEY, "second"))


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_this_machine_needs_no_key(peer: str) -> None:
    assert status(OPEN, peer) == 200


@pytest.mark.parametrize(
    "peer", ["10.0.0.1", "8.8.8.8", "::ffff:10.0.0.1", "fe80::1", "", None, "localhost", "0.0.0.0"]
)
def test_any_other_address_is_refused_without_a_key(peer: str | None) -> None:
    assert status(OPEN, peer) == 401
    assert status(KEYED, peer) == 401
    assert status(KEYED, peer, authorization=f"Bearer {KEY}") == 200


@pytest.mark.parametrize("name", ["x_forwarded_for", "forwarded", "x_real_ip", "via"])
def test_a_forwarded_address_is_never_trusted(name: str) -> None:
    assert status(OPEN, "127.0.0.1", **{name: "127.0.0.1"}) == 401
    assert status(OPEN, "10.0.0.1", **{name: "127.0.0.1"}) == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "192.168.0.1"]
)
def test_a_foreign_host_header_is_refused_without_a_key(host: str) -> None:
    assert status(OPEN, "127.0.0.1", host=host) == 403
    assert status(KEYED, "127.0.0.1", host=host, x_api_key=KEY) == 200
    assert status(Access((), (), ("evil.example",)), "127.0.0.1", host="evil.example") == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080"])
def test_the_machines_own_names_are_known(host: str) -> None:
    assert status(OPEN, "127.0.0.1", host=host) == 200


def test_a_foreign_page_is_refused_unless_named() -> None:
    page = "http://evil.example"
    assert status(OPEN, "127.0.0.1", origin=page) == 403
    assert status(OPEN, "127.0.0.1", origin="null") == 403
    assert status(KEYED, "127.0.0.1", origin=page, x_api_key=KEY) == 403
    assert status(Access((), (page,)), "127.0.0.1", origin=page) == 200
    assert status(Access((), ("*",)), "127.0.0.1", origin=page) == 200
    assert status(OPEN, "127.0.0.1", origin="http://localhost:8080") == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": KEY},
        {"x_api_key": "wrong"},
    ],
)
def test_only_a_whole_key_fits(headers: dict[str, str]) -> None:
    assert status(KEYED, "127.0.0.1", **headers) == 401


def test_either_header_and_any_key_will_do() -> None:
    assert status(KEYED, "127.0.0.1", authorization=f"bearer {KEY}") == 200
    assert status(KEYED, "127.0.0.1", x_api_key="second") == 200


def test_addresses_and_names() -> None:
    assert not is_loopback("::ffff:128.0.0.1")
    assert host_name("[::1]:80") == "::1"
    assert host_name("::1") == "::1"


def test_row_31_every_route_but_health_needs_the_key(keyed: Running) -> None:
    routes = keyed.client.get("/openapi.json").json()["paths"]
    assert len(routes) >= 12
    keyed.client.headers.pop("authorization")
    try:
        for path, methods in routes.items():
            for method in methods:
                reply = keyed.client.request(method.upper(), path.replace("{name}", "x"))
                assert reply.status_code == (200 if path == "/health" else 401), path
        assert keyed.client.get("/openapi.json").status_code == 401
        assert keyed.client.get("/nowhere").status_code == 401
        reply = keyed.client.post("/v1/chat/completions")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["code"] == "missing_api_key"
    finally:
        keyed.client.headers["authorization"] = f"Bearer {KEY}"


def test_row_31_cors_is_closed_unless_given(server: Running) -> None:
    asked = {"origin": "http://page.example", "access-control-request-method": "POST"}
    reply = server.client.options("/v1/chat/completions", headers=asked)
    assert reply.status_code == 403
    assert "access-control-allow-origin" not in reply.headers
    with serving(None, cors_origin=("http://page.example",)) as running:
        reply = running.client.options("/v1/chat/completions", headers=asked)
        assert reply.headers["access-control-allow-origin"] == "http://page.example"
        reply = running.client.get("/v1/models", headers={"origin": "http://page.example"})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "http://page.example"
        reply = running.client.get("/v1/models", headers={"origin": "http://other.example"})
        assert reply.status_code == 403


def test_a_rebound_name_is_refused_on_the_socket(server: Running) -> None:
    reply = server.client.get("/v1/models", headers={"host": "evil.example"})
    assert reply.status_code == 403
    assert "--api-key" in reply.json()["error"]["message"]


def test_a_proxied_request_is_refused_on_the_socket(server: Running) -> None:
    reply = server.client.get("/v1/models", headers={"x-forwarded-for": "127.0.0.1"})
    assert reply.status_code == 401
    assert "--api-key" in reply.json()["error"]["message"]
