"""Processor options of every family: unknown ones and absurd values are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from opsin import families
from opsin.errors import InputError
from opsin.families.base import Family, check_options

from .checkpoints import Case
from .pictures import picture
from .test_families import is_ported
from .test_grid_videos import clip
from .zoo import CASES, each

ABSURD: tuple[Any, ...] = ("x", "7", -1, 0, 10**9, None, [], True, 1.5, {"a": 1}, float("nan"))
FILES = ("processor_config.json", "preprocessor_config.json")


def family_of(case: Case) -> Family:
    """A case's family, without its weights."""
    settings: dict[str, Any] = {}
    for file in FILES:
        settings |= case.files.get(file, {})
    settings |= settings.pop("image_processor", {})
    return families.load(dict(case.config), settings)


@pytest.fixture(
    params=each(case for case in CASES if case.served_type is None and is_ported(case)), ids=str
)
def family(request: pytest.FixtureRequest) -> Family:
    """The family of each case."""
    return family_of(request.param)


def test_an_unknown_option_is_named(family: Family) -> None:
    with pytest.raises(InputError, match="no_such_thing"):
        check_options(family, {"no_such_thing": 1})
    check_options(family, dict.fromkeys(family.processor_options))


def test_an_absurd_value_is_answered_or_refused(family: Family) -> None:
    if "image" not in family.modalities or not family.processor_options:
        pytest.skip("takes no options with pictures")
    for option in family.processor_options:
        answers = [prepared(family, {option: value}) for value in ABSURD]
        refused = [error for error in answers if error is not None]
        assert refused, option
        assert {error.param for error in refused} <= {"processor_kwargs", "image"}, option


def prepared(family: Family, options: dict[str, Any]) -> InputError | None:
    """Prepare a picture, and a video where one is taken; the refusal, if it is refused."""
    try:
        family.prepare_image(picture(1, 90, 60), options)
        if "video" in family.modalities:
            family.prepare_video(clip(1, 2, (60, 40)), options)
    except InputError as error:
        return error
    return None


def test_a_video_is_not_made_larger_than_memory(family: Family) -> None:
    if "video" not in family.modalities or "min_pixels" not in family.processor_options:
        pytest.skip("takes no pixels for videos")
    with pytest.raises(InputError, match="min_pixels"):
        family.prepare_video(clip(1, 20, (60, 40)), {"min_pixels": 1 << 26})
