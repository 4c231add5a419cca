"""PDF files in requests: each protocol's part becomes pictures of the pages, or a clear refusal."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest

from opsin.errors import InputError
from opsin.media.document import load_pages
from opsin.server import anthropic, conversation
from opsin.types import Media

from ..media.papers import filled, pdf
from .running import Running

PAPER = pdf([filled(1, 0, 0), filled(0, 1, 0)], [(60, 40), (60, 40)])
URL = "data:application/pdf;base64," + base64.b64encode(PAPER).decode()
TEXT = {"type": "text", "text": "What is this?"}


def ask(server: Running, *parts: dict[str, Any], **fields: Any) -> Any:
    message = {"role": "user", "content": [*parts, TEXT]}
    return server.chat(messages=[message], **fields)


def as_pictures() -> list[dict[str, Any]]:
    parts = []
    for page in load_pages(PAPER):
        buffer = io.BytesIO()
        page.image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def told(reply: Any) -> tuple[Any, Any]:
    body = reply.json()
    assert reply.status_code == 200, body
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]


def test_a_file_is_its_pages(server: Running, media_root: Path) -> None:
    (media_root / "paper.pdf").write_bytes(PAPER)
    expected = told(ask(server, *as_pictures()))
    raw = URL.partition(",")[2]
    for held in (
        {"file_data": URL, "filename": "paper.pdf"},
        {"file_data": raw},
        {"file_url": f"file://{media_root / 'paper.pdf'}"},
    ):
        assert told(ask(server, {"type": "file", "file": held})) == expected
    picture = {"type": "image_url", "image_url": {"url": "paper.pdf"}}
    assert told(ask(server, picture)) == expected
    sharper = ask(server, {"type": "file", "file": {"file_data": URL}, "dpi": 300})
    assert [image["width"] for image in sharper.json()["images"]] == [250, 250]


def test_responses_take_an_input_file(server: Running) -> None:
    part = {"type": "input_file", "filename": "paper.pdf", "file_data": URL}
    asked = {"role": "user", "content": [part, {"type": "input_text", "text": "What is this?"}]}
    body = {"input": [asked], "max_output_tokens": 4}
    reply = server.post("/v1/responses", body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["input_tokens"] == told(ask(server, *as_pictures()))[1]
    part = {"type": "input_file", "file_id": "file-1"}
    reply = server.post("/v1/responses", {"input": [{"role": "user", "content": [part]}]})
    assert (reply.status_code, "keeps no files" in reply.text) == (400, True)


def test_messages_take_a_document(server: Running) -> None:
    source = {"type": "base64", "media_type": "application/pdf", "data": URL.partition(",")[2]}
    block = {"type": "document", "source": source, "title": "A paper"}
    body = {"max_tokens": 4, "messages": [{"role": "user", "content": [block, TEXT]}]}
    reply = server.post("/v1/messages", body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["input_tokens"] > 0
    counted = server.post("/v1/messages/count_tokens", {"messages": body["messages"]}).json()
    assert counted["input_tokens"] == told(ask(server, *as_pictures()))[1]


@pytest.mark.parametrize(
    ("held", "status", "says"),
    [
        ({"file_data": URL[:200]}, 400, "damaged or incomplete"),
        ({"file_data": "data:application/pdf;base64,AAAA"}, 415, "neither a PDF nor a picture"),
        ({"file_data": "!"}, 400, "not valid base64"),
        ({"file_url": "http://127.0.0.1/a.pdf"}, 400, "loopback"),
        ({"file_url": "/etc/hostname"}, 400, "may read"),
        ({"file_id": "file-1"}, 400, "names no document"),
    ],
)
def test_what_cannot_be_read_is_refused(
    server: Running, held: dict[str, str], status: int, says: str
) -> None:
    reply = ask(server, {"type": "file", "file": held})
    assert (reply.status_code, says in reply.json()["error"]["message"]) == (status, True), (
        reply.text
    )
    assert server.chat().status_code == 200


def test_too_many_pages_are_refused_over_all_files(server: Running) -> None:
    many = pdf([filled(1, 0, 0)] * 33, [(9, 9)] * 33)
    url = "data:application/pdf;base64," + base64.b64encode(many).decode()
    part = {"type": "file", "file": {"file_data": url}}
    reply = ask(server, part, part)
    assert reply.status_code == 413
    assert "66 pages" in reply.json()["error"]["message"]
    assert "--max-pages" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "file", "file": {"file_data": URL}, "dpi": -1}, "dpi"),
        ({"type": "file", "file": {"file_data": URL}, "colour": 1}, "colour"),
        ({"type": "file", "file": {"file_data": 7}}, "content"),
    ],
)
def test_odd_fields_are_named(part: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError, match=param):
        conversation.conversation([{"role": "user", "content": [part]}])


def test_citations_are_refused() -> None:
    source = {"type": "url", "url": "https://host/a.pdf"}
    block = {"type": "document", "source": source, "citations": {"enabled": True}}
    with pytest.raises(InputError, match="citations cannot be used"):
        anthropic._part(block, "messages[0].content[0]")
    (message,) = conversation.conversation(
        [{"role": "user", "content": [anthropic._part({**block, "citations": None}, "x")]}]
    )
    assert message.media == (Media("document", "https://host/a.pdf"),)
