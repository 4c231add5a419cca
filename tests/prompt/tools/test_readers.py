"""Every dialect's reader, by one set of checks."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.prompt.tools.dialect import CallArguments, CallEnd, CallStart, Dialect, TextPiece
from opsin.prompt.tools.index import DIALECTS

from .samples import AT_THE_START, SAMPLES, TOOLS, WEATHER, joined, read

every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
PARTS = ('{"', '": ', "[", "]", "}", "(", ")", ",", "=", ":", "\\", '"', "'", "\n", " ", "é", "1")
NAMES = ("get_weather", "now", "name", "arguments", "parameters", "city", "call:", "function")


def test_every_dialect_has_a_sample() -> None:
    assert set(SAMPLES) == set(DIALECTS)


@every_dialect
def test_calls_are_read_one_after_the_other(dialect: Dialect) -> None:
    events = read(dialect, SAMPLES[dialect.name])
    assert [type(event) for event in events] == [CallStart, CallArguments, CallEnd] * 2
    assert events[0] == CallStart(0, "get_weather")
    assert json.loads(events[1].fragment) == WEATHER
    assert events[3] == CallStart(1, "now")
    assert events[4] == CallArguments(1, "{}")


@every_dialect
def test_arguments_come_as_they_are_written(dialect: Dialect) -> None:
    reader = dialect.reader(TOOLS)
    sample = SAMPLES[dialect.name]
    middle = sample.index("is")
    events = joined(reader.feed(sample[:middle]))
    assert [type(event) for event in events] == [CallStart, CallArguments]
    assert "Par" in events[1].fragment
    more = joined(reader.feed(sample[middle : middle + 2]))
    assert more == [CallArguments(0, "is")]


@every_dialect
def test_text_before_calls_stays_text(dialect: Dialect) -> None:
    before = "Let me see" + ("\n" if dialect.name in AT_THE_START else ". ")
    if dialect.name == "llama3_json":
        before += "<|python_tag|>"
    events = read(dialect, before + SAMPLES[dialect.name])
    assert events[0] == TextPiece(before.removesuffix("<|python_tag|>").rstrip())
    assert events[1] == CallStart(0, "get_weather")


@every_dialect
def test_text_without_calls_is_not_touched(dialect: Dialect) -> None:
    text = ' \nA [list], {"a": 1}, <b>, `f(1)`, functions and tool calls: none. <\n\n'
    assert read(dialect, text) == [TextPiece(text)]
    assert read(dialect, text, [1] * len(text)) == [TextPiece(text)]


@every_dialect
def test_a_marker_that_does_not_come_is_held_back_only_so_long(dialect: Dialect) -> None:
    start = next(text for text in reversed(dialect.starts))
    if len(start) < 2:
        pytest.skip("no marker")
    reader = dialect.reader(TOOLS)
    assert joined(reader.feed("a" + start[:-1])) == [TextPiece("a")]
    assert joined(reader.feed("\x00")) == [TextPiece(start[:-1] + "\x00")]


@every_dialect
def test_text_without_pieces_held_back_comes_at_once(dialect: Dialect) -> None:
    reader = dialect.reader(TOOLS)
    assert joined(reader.feed("Hello")) == [TextPiece("Hello")]


@every_dialect
def test_a_call_that_the_text_breaks_off_in_ends(dialect: Dialect) -> None:
    sample = SAMPLES[dialect.name]
    for length in range(len(sample)):
        events = read(dialect, sample[:length])
        starts = [event for event in events if isinstance(event, CallStart)]
        ends = [event for event in events if isinstance(event, CallEnd)]
        assert [event.index for event in starts] == [event.index for event in ends]
        assert events == read(dialect, sample[:length], [1] * length)


@every_dialect
def test_arguments_broken_off_are_not_whole(dialect: Dialect) -> None:
    sample = SAMPLES[dialect.name]
    events = read(dialect, sample[: sample.index("2.5")])
    arguments = "".join(event.fragment for event in events if isinstance(event, CallArguments))
    with pytest.raises(ValueError):
        json.loads(arguments)


@every_dialect
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_pieces_of_any_size_give_the_same_events(dialect: Dialect, data: st.DataObject) -> None:
    text = "Hi. \n" + SAMPLES[dialect.name] + "\n\n" + SAMPLES[dialect.name][:-3]
    sizes = data.draw(st.lists(st.integers(0, 40), max_size=60))
    assert read(dialect, text, sizes) == read(dialect, text)


@every_dialect
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_text_is_refused(dialect: Dialect, data: st.DataObject) -> None:
    marks = (*dialect.markers, *dialect.starts, "```", "json", "<function=", "</parameter>")
    sample = SAMPLES[dialect.name]
    cut = st.integers(0, len(sample)).flatmap(
        lambda a: st.integers(a, len(sample)).map(lambda b: sample[a:b])
    )
    part = st.one_of(st.sampled_from((*marks, *PARTS, *NAMES)), cut, st.text(max_size=3))
    text = "".join(data.draw(st.lists(part, max_size=12)))
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=20))
    events = read(dialect, text)
    assert events == read(dialect, text, sizes)
    opened = [event.index for event in events if isinstance(event, CallStart)]
    assert opened == list(range(len(opened)))
    assert opened == [event.index for event in events if isinstance(event, CallEnd)]


@every_dialect
@pytest.mark.parametrize("by_char", [False, True])
def test_reading_is_linear(dialect: Dialect, by_char: bool) -> None:
    """Quadratic reading of these texts would take minutes."""
    sample = SAMPLES[dialect.name]
    size = 5_000 if by_char else 80_000
    texts = (
        sample.replace("Par", "Par" + "x <|y " * (size // 6)),
        sample * (size // len(sample)),
        dialect.starts[-1] * (size // len(dialect.starts[-1])),
        sample.replace("1, 2.5", "[" * size).replace("1,2.5", "[" * size),
        sample[: sample.index("is")] + "<" * size,
    )
    start = time.perf_counter()
    for text in texts:
        read(dialect, text, [1] * len(text) if by_char and len(text) < 20_000 else ())
    assert time.perf_counter() - start < 20
