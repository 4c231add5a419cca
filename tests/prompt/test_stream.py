"""The stream splitter: the same segments however the text is cut."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.prompt.stream import THINK, Segment, StreamSplitter, Tag, open_tag, split

TOOL = Tag("tool_call", "<tool_call>", "</tool_call>")
REST = Tag("tool_call", "[CALLS]")
TAGS = [THINK, TOOL, REST]
WORDS = st.sampled_from(
    [
        "a",
        "b ",
        "<",
        ">",
        "</",
        "think>",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "[",
        "[CALLS]",
    ]
)
TEXTS = st.lists(WORDS, max_size=25).map("".join)


def merged(segments: list[Segment]) -> list[tuple[str, int, str, bool]]:
    """Each run's text, put together."""
    runs: dict[tuple[str, int], tuple[str, bool]] = {}
    for piece in segments:
        text, done = runs.get((piece.kind, piece.block), ("", False))
        assert not done, "a piece came after the block's last"
        runs[piece.kind, piece.block] = (text + piece.text, piece.done)
    return [(kind, block, text, done) for (kind, block), (text, done) in runs.items()]


def reference(text: str, inside: Tag | None) -> list[tuple[str, str, bool]]:
    """Runs found by searching the whole text, one tag after another."""
    runs: list[tuple[str, str, bool]] = []
    while True:
        if inside is None:
            found = re.search("|".join(re.escape(tag.start) for tag in TAGS), text)
            kind = "text"
        else:
            found = re.search(re.escape(inside.end), text) if inside.end else None
            kind = inside.kind
        run = text if found is None else text[: found.start()]
        open_ended = found is None and inside is not None and not inside.end
        done = inside is not None and (found is not None or open_ended)
        if run or done:
            runs.append((kind, run, done))
        if found is None:
            return runs
        text = text[found.end() :]
        inside = next(tag for tag in TAGS if tag.start == found[0]) if inside is None else None


@given(TEXTS, st.lists(st.integers(0, 300), max_size=30), st.sampled_from([None, *TAGS]))
def test_any_cutting_gives_the_same(text: str, cuts: list[int], inside: Tag | None) -> None:
    marks = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    splitter = StreamSplitter(TAGS, inside)
    segments = [
        segment for a, b in itertools.pairwise(marks) for segment in splitter.push(text[a:b])
    ]
    segments += splitter.finish()
    runs = [(kind, run, done) for kind, _, run, done in merged(segments)]
    assert runs == reference(text, inside)
    assert [(kind, run, done) for kind, _, run, done in merged(split(text, TAGS, inside))] == runs


@given(TEXTS)
def test_only_tags_are_taken_out(text: str) -> None:
    segments = split(text, [THINK])
    put_back = ""
    for kind, _, run, done in merged(segments):
        put_back += f"<think>{run}</think>" if done else run if kind == "text" else f"<think>{run}"
    assert put_back == text or put_back + "<think>" == text


def test_a_partial_tag_is_held_back() -> None:
    splitter = StreamSplitter([THINK])
    assert splitter.push("a<thi") == [Segment("text", "a", 0)]
    assert splitter.push("nk>b") == [Segment("reasoning", "b", 1)]
    assert splitter.push("</thin") == []
    assert splitter.push("g") == [Segment("reasoning", "</thing", 1)]
    assert splitter.push("</think>c") == [
        Segment("reasoning", "", 1, done=True),
        Segment("text", "c", 2),
    ]


def test_calls_in_a_row_are_told_apart() -> None:
    made = split("<tool_call>1</tool_call><tool_call>2</tool_call>", [TOOL])
    assert [(s.kind, s.text, s.done) for s in made] == [
        ("tool_call", "1", True),
        ("tool_call", "2", True),
    ]
    assert made[0].block != made[1].block


def test_a_cut_off_block_is_not_done() -> None:
    assert split("<tool_call>1", [TOOL])[-1].done is False
    assert split("[CALLS]1", [REST])[-1].done is True


def test_the_template_may_have_opened_the_block() -> None:
    inside = open_tag("<|im_start|>assistant\n<think>\n", TAGS)
    assert inside == THINK
    assert [s.kind for s in split("hm</think>yes", TAGS, inside)] == ["reasoning", "text"]
    assert open_tag("<think> is a tag<|im_end|>", TAGS) is None
    assert open_tag("<think>\n\n</think>\n\n", TAGS) is None


def test_without_tags_all_is_text() -> None:
    assert split("<think>x", []) == [Segment("text", "<think>x", 0)]


def test_long_texts_take_linear_time() -> None:
    text = "<think>a</think>b" * 5000
    made = merged(split(text, [THINK]))
    assert len(made) == 10_000
    assert {run for _, _, run, _ in made} == {"a", "b"}


@pytest.mark.parametrize("start", [1, 4090, 4095, 4096])
def test_tags_across_the_inner_pieces(start: int) -> None:
    made = merged(split("x" * start + "<think>y</think>", [THINK]))
    assert [run for _, _, run, _ in made] == ["x" * start, "y"]
