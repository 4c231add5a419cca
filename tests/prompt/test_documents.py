"""Documents in a conversation: pages in their place, under one sum."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsin.errors import InputError, MediaTooLarge
from opsin.media.limits import MediaLimits
from opsin.prompt.documents import pages_of, with_pages
from opsin.prompt.formats import MessageFormat, message_dict
from opsin.prompt.messages import parse_messages
from opsin.types import Media, Text, Timings
from tests.media.papers import filled, pdf

PAPER = pdf([filled(1, 0, 0), filled(0, 1, 0)])


def test_pages_stand_where_the_document_stood(tmp_path: Path) -> None:
    path = tmp_path / "paper.pdf"
    path.write_bytes(PAPER)
    parts = [
        "before",
        {"type": "file", "file": {"path": str(path)}, "pages": [2], "dpi": 72},
        "between",
        {"type": "document", "document": PAPER},
        {"type": "image", "image": str(path)},
    ]
    timings = Timings()
    messages = parse_messages([{"role": "user", "content": parts}])
    (message,) = with_pages(messages, MediaLimits(), timings)
    shown = [
        part.text if isinstance(part, Text) else part.options["page"] for part in message.content
    ]
    assert shown == ["before", 2, "between", 1, 2, 1, 2]
    assert message.media[0].source.getpixel((20, 80)) == (0, 255, 0)
    assert timings.decode > 0


def test_all_documents_share_one_allowance() -> None:
    two = [Media("document", PAPER), Media("image", PAPER)]
    assert len(pages_of(two, MediaLimits(max_pages=4), Timings())) == 4
    with pytest.raises(MediaTooLarge, match="4 pages, the limit is 3"):
        pages_of(two, MediaLimits(max_pages=3), Timings())


@pytest.mark.parametrize("written", [MessageFormat.LIST_WITH_IMAGE, MessageFormat.IMAGE_TOKEN])
def test_a_template_alone_cannot_count_pages(written: MessageFormat) -> None:
    (message,) = parse_messages([{"role": "user", "content": [Media("document", "a.pdf")]}])
    with pytest.raises(InputError, match="cannot name a document"):
        message_dict(written, message)
