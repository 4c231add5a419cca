"""Metrics, access log, request ids, health and readiness."""

from __future__ import annotations

import base64
import io
import json
import logging
import re

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from .running import Running, serving, wait_for


def samples(server: Running) -> dict[str, float]:
    """Every sample of the metrics page, by name and labels."""
    text = server.client.get("/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def fresh_picture() -> str:
    """A picture that no other test sends, as a data URL."""
    buffer = io.BytesIO()
    Image.new("RGB", (83, 61), (201, 17, 93)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_requests_tokens_and_stages_are_counted(server: Running) -> None:
    before = samples(server)
    # A picture of its own: one that another test sent would come prepared from the cache.
    part = {"type": "image_url", "image_url": {"url": fresh_picture()}}
    content = [part, {"type": "text", "text": "?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5}
    usage = server.post("/v1/chat/completions", {**body, "ignore_eos": True}).json()["usage"]
    server.client.get("/nowhere")
    wait_for(lambda: samples(server) != before)
    after = samples(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("opsin_generated_tokens_total") == 5
    assert grown("opsin_prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("opsin_media_total{kind=image}") == 1
    assert grown("opsin_media_tokens_total{kind=image}") > 0
    assert grown("opsin_requests_total{route=/v1/chat/completions,status=200}") == 1
    assert grown("opsin_requests_total{route=none,status=404}") == 1
    assert grown("opsin_time_to_first_token_seconds_count") == 1
    assert grown("opsin_inter_token_seconds_count") == 4
    for stage in ("decode", "preprocess", "queue", "prefill", "generate"):
        assert grown(f"opsin_stage_seconds_count{{stage={stage}}}") == 1
    assert after["opsin_engine_running{model=tiny-vl}"] == 0
    assert after["opsin_engine_free_blocks{model=tiny-vl}"] > 0
    assert after["opsin_requests_in_flight"] == 0


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[dict]:
    """What the access log writes."""
    logger = logging.getLogger("opsin.access")
    found: list[dict] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(record.getMessage()))

    handler = Keep()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_access_log_has_a_line_a_request(server: Running, lines: list[dict]) -> None:
    reply = server.chat("hello", max_tokens=3)
    wait_for(lambda: bool(lines))
    (line,) = lines
    assert line["id"] == reply.headers["x-request-id"]
    assert (line["method"], line["path"]) == ("POST", "/v1/chat/completions")
    assert (line["status"], line["peer"], line["model"]) == (200, "127.0.0.1", "tiny-vl")
    assert line["generated_tokens"] == 3
    assert line["ms"] > 0


def test_a_client_that_leaves_is_logged_as_such(server: Running, lines: list[dict]) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        next(reply.iter_lines())
    wait_for(lambda: bool(lines))
    assert lines[0]["status"] == 499


def test_a_request_id_is_the_clients_when_it_is_harmless(server: Running) -> None:
    given = server.client.get("/version", headers={"x-request-id": "abc-1.2_3"})
    assert given.headers["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "x" * 65, "é".encode("latin-1"), ""):
        reply = server.client.get("/version", headers={"x-request-id": bad})
        assert re.fullmatch("[0-9a-f]{16}", reply.headers["x-request-id"])


def test_ready_waits_for_the_model_and_health_does_not(server: Running) -> None:
    assert server.client.get("/ready").json() == {"status": "ready", "models": ["tiny-vl"]}
    server.service.draining = True
    try:
        assert server.client.get("/ready").status_code == 503
        reply = server.chat()
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    finally:
        server.service.draining = False
    with serving(None) as idle:
        assert idle.client.get("/health").status_code == 200
        assert idle.client.get("/ready").status_code == 200


def test_the_document_describes_every_route(server: Running) -> None:
    document = server.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert chat["application/json"]["schema"]["$ref"].endswith("/ChatBody")
    assert "temperature" in schemas["ChatBody"]["properties"]
    text = json.dumps(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in schemas
    for path in ("/health", "/ready", "/metrics", "/version", "/load", "/unload", "/tokenize"):
        assert path in document["paths"]
