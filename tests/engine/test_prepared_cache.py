"""Media prepared once: what is spared the second time, and what is never shared."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch

import opsin
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.prepared_cache import PreparedCache, prepared_key
from opsin.families.base import MediaInput
from opsin.media.limits import MediaLimits
from tests.families.checkpoints import write_checkpoint
from tests.families.ours import answers, tokens
from tests.families.pictures import picture
from tests.families.zoo import CASES
from tests.media.samples import reply, web_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = next(case for case in CASES if case.name == "qwen3_vl-published_tied")
    return write_checkpoint(case, tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Any]:
    limits = MediaLimits(allow_private_addresses=True)
    return opsin.load(str(folder), device="cpu", media_limits=limits)


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed, 90, 70).save(file, "PNG")
    return file.getvalue()


class Counted:
    """Counts the calls of a family's `prepare_image`."""

    def __init__(self, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        prepare = family.prepare_image

        def counted(*arguments: Any) -> MediaInput:
            self.calls += 1
            return prepare(*arguments)

        monkeypatch.setattr(family, "prepare_image", counted)


def test_the_same_bytes_are_prepared_once_however_they_come(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processor = loaded[1]
    data = encoded(1)
    counted = Counted(processor.family, monkeypatch)
    (tmp_path / "a.png").write_bytes(data)
    data_url = "data:image/png;base64," + base64.b64encode(data).decode()
    with web_server(lambda handler: reply(handler, data)) as url:
        sources = [data, data_url, tmp_path / "a.png", f"{url}/x.png", f"{url}/x.png"]
        prompts = [processor.prepare("What?", images=[source]) for source in sources]
    assert counted.calls == 1
    assert (processor.prepared.hits, processor.prepared.misses) == (4, 1)
    assert (processor.fetched.hits, processor.fetched.misses) == (1, 1)
    first = prompts[0].media[0]
    for prompt in prompts[1:]:
        own = prompt.media[0]
        assert own is not first
        assert own.indices is not first.indices
        assert torch.equal(own.indices, first.indices)
        assert own.key == first.key
        assert prompt.timings.preprocess == 0


def test_other_bytes_settings_and_salts_are_prepared_anew(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = loaded[1]
    counted = Counted(processor.family, monkeypatch)
    asked: list[dict[str, Any]] = [
        {"images": [encoded(1)]},
        {"images": [encoded(2)]},
        {"images": [encoded(1)], "options": {"resize_shape": [56, 56]}},
        {"images": [encoded(1)], "options": {"max_pixels": 4096}},
        {"images": [encoded(1)], "salt": b"other"},
    ]
    for _ in range(2):
        for arguments in asked:
            prompt = processor.prepare("What?", **arguments)
            assert prompt.cache_salt == arguments.get("salt", b"")
    assert counted.calls == len(asked)


def test_a_picture_that_is_to_be_kept_comes_with_what_was_prepared(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = loaded[1]
    counted = Counted(processor.family, monkeypatch)
    kept = []
    for keep in (False, True, True, False):
        prompt = processor.prepare("What?", images=[encoded(1)], keep_pictures=keep)
        kept.append(prompt.media[0].picture)
    assert [image is not None for image in kept] == [False, True, True, False]
    assert counted.calls == 2  # the first time, and the first time that the picture was wanted


def test_the_cache_is_bounded_and_gives_copies() -> None:
    def item(rows: int) -> MediaInput:
        return MediaInput("image", {"pixels": torch.zeros(rows, 25)}, "", 0)

    cache = PreparedCache(max_bytes=1000)
    keys = [prepared_key(b"", number) for number in range(4)]
    for key, rows in zip(keys, (4, 4, 4, 11), strict=True):
        cache.put(key, item(rows))
    assert cache.num_bytes == 800  # the first was let go, the last does not fit
    assert [cache.get(key, with_picture=False) is not None for key in keys] == [0, 1, 1, 0]
    one, other = (cache.get(keys[1], with_picture=False) for _ in range(2))
    assert one is not None
    assert other is not None
    one.indices = torch.ones(3)
    one.features["more"] = torch.ones(1)
    assert not len(other.indices)
    assert set(other.features) == {"pixels"}
    cache.put(keys[1], item(8))
    assert cache.num_bytes <= 1000
    assert prepared_key(b"a", "b") != prepared_key(b"", "ab") != prepared_key(b"ab")


def test_the_second_question_skips_every_stage_and_gets_the_same_answer(
    loaded: tuple[Any, Any],
) -> None:
    model, processor = loaded
    limits = EngineLimits(memory=1 << 24, block_size=8)
    with web_server(lambda handler: reply(handler, encoded(3))) as url:
        with Engine(model, processor, limits) as engine:
            found = []
            for question in ("What is there?", "How many?", "How many?"):
                prompt = processor.prepare(question, images=[f"{url}/p.png"])
                (events,) = answers(engine, [prompt], count=8)
                found.append(events)
            stats = engine.stats()
        assert {name: stats[f"{name}_hits"] for name in ("fetched", "prepared")} == {
            "fetched": 2,
            "prepared": 2,
        }
        assert stats["prepared_bytes"] > 0
        assert found[1][-1].usage.cached_tokens > len(prompt.media[0].indices) // 2
        with Engine(model, processor, EngineLimits(memory=1 << 24, prefix_cache=False)) as engine:
            prompt = processor.prepare("How many?", images=[picture(3, 90, 70)])  # nothing is kept
            (events,) = answers(engine, [prompt], 8)
    assert tokens(events) == tokens(found[1]) == tokens(found[2])
