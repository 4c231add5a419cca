"""Stop strings: nothing of one gets out, however the text is cut."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from opsin.prompt.matching import StreamMatcher
from opsin.prompt.stop import StopMatcher

LETTERS = st.text("ab\n", max_size=40)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text before the stop string that ends first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def pieces(text: str, cuts: list[int]) -> list[str]:
    marks = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(marks)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=12), st.booleans())
def test_any_cutting_gives_the_same(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    given_out = [matcher.push(piece) for piece in pieces(text, cuts)] + [matcher.finish()]
    expected, matched = reference(text, stops, include)
    assert "".join(given_out) == expected
    assert matcher.matched == matched


@given(LETTERS, STOPS)
def test_nothing_leaks_and_little_is_held(text: str, stops: list[str]) -> None:
    expected, matched = reference(text, stops, include=False)
    matcher = StopMatcher(stops)
    out = ""
    for seen, char in enumerate(text, start=1):
        out += matcher.push(char)
        assert expected.startswith(out)
        if matched is None:
            starts = [
                k for stop in stops for k in range(len(stop)) if text[:seen].endswith(stop[:k])
            ]
            assert len(out) == seen - max(starts, default=0)


def test_the_end_gives_out_what_was_held() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("a ST") == "a "
    assert matcher.finish() == "ST"


def test_after_a_stop_nothing_comes() -> None:
    matcher = StopMatcher(["\n\n", "END"], include_stop=True)
    assert matcher.push("x\n") == "x"
    assert matcher.push("\nENDmore") == "\n\n"
    assert matcher.stopped
    assert (matcher.push("y"), matcher.finish()) == ("", "")


def test_empty_stop_strings_do_not_count() -> None:
    matcher = StopMatcher(["", "b"])
    assert matcher.push("ab") == "a"


def test_time_is_linear_in_the_text() -> None:
    steps = 0

    class Counting(StreamMatcher):
        def _step(self, char: str) -> int | None:
            nonlocal steps
            steps += 1
            return super()._step(char)

    matcher = Counting(["a" * 500 + "b"])
    for _ in range(200):
        matcher.push("a" * 50)
    assert steps == 200 * 50
    assert matcher.finish() == "a" * 500
