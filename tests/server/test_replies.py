"""Events to deltas: reasoning, its tokens and its budget; and the courier between threads."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opsin.families.base import Prompt
from opsin.prompt.answer import AnswerReader
from opsin.prompt.stream import THINK, open_tag
from opsin.server.courier import Courier
from opsin.server.job import nth_sampling
from opsin.server.replies import Reader
from opsin.server.request import Answer, Request
from opsin.server.thinking import thinking_budget
from opsin.types import Event, Message, SamplingParams, Text, Usage

from ..families.checkpoints import write_checkpoint
from ..families.zoo import qwen
from .running import Running, serving

REQUEST = Request("m", SamplingParams(), (Message("user", (Text("x"),)),))


def prompt(text: str) -> Prompt:
    return Prompt([1], torch.zeros(1, 1), 1, text=text)


def read(pieces: list[str], ending: str = "assistant\n", request: Request = REQUEST) -> Answer:
    tags = (THINK,) if request.messages else ()
    reader = Reader(0, prompt(ending), AnswerReader(tags, open_tag(ending, tags)))
    answer = Answer()
    for piece in pieces[:-1]:
        answer.add(reader.push(Event(piece, (1,))))
    answer.add(reader.push(Event(pieces[-1], (1,), finish_reason="stop", usage=Usage(1, 9))))
    return answer


def test_reasoning_is_told_from_the_answer_and_its_tokens_counted() -> None:
    answer = read(["<th", "ink>\n", "so ", "it is</thi", "nk>", "\n\n", "yes", "!"])
    assert (answer.reasoning, answer.text) == ("so it is", "yes!")
    assert answer.num_reasoning == 3  # from the token that opens to the one that closes


@pytest.mark.parametrize("ending", ["assistant\n", "assistant\n<think>\n"])
@pytest.mark.parametrize("has_end_token", [True, False])
@pytest.mark.parametrize(
    "pieces",
    [
        ["<th", "ink>\n", "so ", "it is</thi", "nk>", "\n\n", "yes", "!"],
        ["hm", "", "</think>\n\nyes", ""],
        ["hm", " still </thi"],
        ["yes"],
    ],
)
def test_an_answer_in_one_event_is_read_as_its_stream_is(
    pieces: list[str], has_end_token: bool, ending: str
) -> None:
    def reader() -> Reader:
        return Reader(0, prompt(ending), AnswerReader((THINK,), open_tag(ending, (THINK,))))

    ends = [len("".join(pieces[:i])) for i in range(1, len(pieces) + 1)]
    given = [*pieces, ""] if has_end_token else pieces
    streamed, one = Answer(), reader()
    for piece in given[:-1]:
        streamed.add(one.push(Event(piece, (1,))))
    streamed.add(one.push(Event(given[-1], (1,), finish_reason="stop", usage=Usage(1, 9))))
    event = Event("".join(pieces), (1,) * len(given), finish_reason="stop", usage=Usage(1, 9))
    whole = Answer()
    whole.add(reader().push(replace(event, ends=ends)))
    assert whole == streamed


def test_a_block_behind_an_answer_in_a_form_is_part_of_it() -> None:
    pieces = ['{"a":', ' "', "<think>", "x", '"}']
    ends = [len("".join(pieces[:i])) for i in range(1, len(pieces) + 1)]
    event = Event("".join(pieces), (1,) * len(pieces), finish_reason="stop", ends=ends)
    piece, reasoning = AnswerReader((THINK,), one_block=True).take(event)
    assert (piece.text, piece.reasoning, reasoning) == ("".join(pieces), "", 0)


def test_a_block_that_the_template_opened() -> None:
    answer = read(["hm", "</think>\n\nyes"], "assistant\n<think>\n")
    assert (answer.reasoning, answer.text) == ("hm", "yes")


def test_a_block_that_never_closes_is_all_reasoning() -> None:
    answer = read(["hm", " still </thi"], "assistant\n<think>\n")
    assert (answer.reasoning, answer.text) == ("hm still </thi", "")


def test_newlines_inside_an_answer_stay() -> None:
    assert read(["\n", "a\n", "\nb\n"]).text == "\na\n\nb\n"


def test_raw_completions_are_not_split() -> None:
    raw = Request("m", SamplingParams(), prompt="x")
    assert read(["<think>a</think>"], request=raw).text == "<think>a</think>"


def test_the_places_that_an_answer_names_are_in_the_reply(
    server: Running, data_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = '[{"bbox_2d": [0, 0, 500, 1000], "label": "cat"}]'
    tokenizer = server.service.manager.loaded[0].processor.tokenizer
    monkeypatch.setattr(tokenizer, "decode", lambda *given, **options: box)
    part = {"type": "image_url", "image_url": {"url": data_url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Where is it?"}]}]
    reply = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    (region,) = reply.json()["choices"][0]["regions"]
    assert (region["type"], region["label"]) == ("box", "cat")
    assert region["box"] == [0, 0, 40, 60]  # of 80 x 60 pixels
    streamed = server.post(
        "/v1/chat/completions", {"messages": messages, "max_tokens": 2, "stream": True}
    )
    assert '"regions":[{"type":"box"' in streamed.text
    assert "regions" not in server.chat().json()["choices"][0]
    reply = server.chat(task="no such task")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "task")


def forced(logits: torch.Tensor) -> int | None:
    """The one token that is left, None if nothing was forced."""
    left = (logits > -torch.inf).nonzero().flatten().tolist()
    return left[0] if len(left) == 1 else None


@pytest.mark.parametrize(
    ("start", "generated", "token"),
    [
        ([], [5, 5], None),
        ([], [5, 5, 5], 8),
        ([], [5, 5, 5, 8], 9),
        ([], [5, 5, 5, 8, 9], None),
        ([], [5, 8, 9, 5, 5, 5], None),
        ([7], [5, 5, 5, 5], None),
        ([7], [7, 5, 5, 5], 8),
    ],
)
def test_a_budget_closes_the_block(
    start: list[int], generated: list[int], token: int | None
) -> None:
    process = thinking_budget(3, start, [8, 9])
    assert forced(process(torch.zeros(12), [1, 2, *generated], 2)) == token


def test_seeds_of_several_answers() -> None:
    sampling = SamplingParams(seed=2**63 - 1)
    assert nth_sampling(sampling, 0).seed == 2**63 - 1
    assert nth_sampling(sampling, 1).seed == 0
    assert nth_sampling(SamplingParams(), 3).seed is None


def test_a_courier_delivers_everything_in_order() -> None:
    async def main() -> list[int]:
        found: list[int] = []
        courier = Courier(asyncio.get_running_loop())
        everything = asyncio.Event()

        def receive(item: int) -> None:
            found.append(item)
            if len(found) == 4000:
                everything.set()

        def send(first: int) -> None:
            for i in range(first, 4000, 4):
                courier.send(receive, i)

        threads = [threading.Thread(target=send, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(everything.wait(), 20)
        return found

    found = asyncio.run(main())
    assert sorted(found) == list(range(4000))
    for i in range(4):
        mine = [item for item in found if item % 4 == i]
        assert mine == sorted(mine)


def test_a_courier_outlives_its_loop() -> None:
    loop = asyncio.new_event_loop()
    courier = Courier(loop)
    loop.close()
    courier.send(print, 1)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is string else "
    "m.content[0].text }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose template opens a reasoning block."""
    case = next(case for case in qwen.CASES if case.family == "qwen3_vl")
    folder = write_checkpoint(case, tmp_path_factory.mktemp("thinker") / "thinker")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def test_a_thinking_model_thinks_within_its_budget(thinker: Path) -> None:
    with serving(thinker) as running:
        running.ready()
        reply = running.chat(max_tokens=40, thinking_budget=6).json()
        message = reply["choices"][0]["message"]
        assert message["reasoning_content"]
        assert 6 <= reply["usage"]["completion_tokens_details"]["reasoning_tokens"] < 20
        assert message["content"]
        plain = running.chat(max_tokens=10, enable_thinking=False).json()["choices"][0]["message"]
        assert "reasoning_content" not in plain
        assert (
            running.chat(reasoning_effort="none", max_tokens=10).json()["choices"][0]["message"]
            == plain
        )


def test_thinking_that_a_model_cannot_do_is_refused(server: Running) -> None:
    for field, value in (
        ("enable_thinking", True),
        ("reasoning_effort", "high"),
        ("thinking_budget", 10),
    ):
        reply = server.chat(**{field: value})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == field
    assert server.chat(enable_thinking=False).status_code == 200
