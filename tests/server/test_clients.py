"""OpenAI's own client against the real server: whole and streamed, text and pictures."""

from __future__ import annotations

import concurrent.futures
import re
from pathlib import Path

import openai
import pytest

from .running import Running

LIMITED = {"max_tokens": 6, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def question(text: str, *urls: str) -> list:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_models_are_listed(client: openai.OpenAI) -> None:
    first = client.models.list().data[0]
    assert first.id == "tiny-vl"
    assert client.models.retrieve("tiny-vl").id == "tiny-vl"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/nothing")


def test_a_stream_says_what_the_whole_reply_says(client: openai.OpenAI, data_url: str) -> None:
    for messages in (question("What is it?"), question("What is it?", data_url)):
        asked = {"model": "default", "messages": messages, **LIMITED}
        whole = client.chat.completions.create(**asked)
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
        assert chunks[-1].usage == whole.usage
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 6


def test_row_27_the_size_that_a_picture_is_seen_at_is_stated(
    client: openai.OpenAI, data_url: str
) -> None:
    asked = {"model": "default", **LIMITED, "logprobs": True}
    one = client.chat.completions.create(messages=question("?", data_url), **asked)
    other = client.chat.completions.create(
        messages=question("?", data_url), **{**asked, "extra_body": {"resize_shape": 128}}
    )
    assert one.model_dump()["images"][0]["width"] == 80
    assert other.model_dump()["images"][0]["processed_width"] == 128
    assert one.usage is not None
    assert one.usage.prompt_tokens_details is not None
    assert one.usage.prompt_tokens_details.model_dump()["image_tokens"] > 0
    first = [choice.logprobs.content[0].logprob for choice in (one.choices[0], other.choices[0])]
    assert first[0] != first[1]


def test_a_file_under_the_media_root_is_read(client: openai.OpenAI, media_root: Path) -> None:
    urls = ["inside.png", f"file://{media_root}/inside.png", str(media_root / "inside.png")]
    replies = [
        client.chat.completions.create(model="default", messages=question("?", url), **LIMITED)
        for url in urls
    ]
    assert len({reply.choices[0].message.content for reply in replies}) == 1


def test_n_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    asked = {
        "model": "default",
        "messages": question("Invent a word"),
        "max_tokens": 8,
        "temperature": 1.0,
        "seed": 7,
        "extra_body": {"ignore_eos": True},
    }
    three = client.chat.completions.create(**asked, n=3)
    again = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert client.chat.completions.create(**asked).choices[0].message.content == texts[0]
    assert three.usage is not None
    assert three.usage.completion_tokens == 24


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    asked = {"model": "default", "messages": question("Tell me"), **LIMITED}
    text = client.chat.completions.create(**asked).choices[0].message.content
    assert text is not None
    stopped = client.chat.completions.create(**asked, stop=[text[2:4]])
    assert stopped.choices[0].message.content == text[: text.index(text[2:4])]
    assert stopped.choices[0].finish_reason == "stop"


def test_log_probabilities(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="default", messages=question("Go"), logprobs=True, top_logprobs=3, **LIMITED
    )
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 6
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    joined = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace")
    joined = re.sub(r"<\|\w+\|>", "", joined)  # special tokens have bytes, but are no text
    assert joined == reply.choices[0].message.content


def test_completions_of_text_and_of_ids(client: openai.OpenAI, server: Running) -> None:
    ids = server.post("/tokenize", {"prompt": "hello"}).json()["tokens"]
    asked = {"model": "default", **LIMITED, "logprobs": 2}
    reply = client.completions.create(prompt=["hello", "bye"], **asked)
    from_ids = client.completions.create(prompt=ids, **asked)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert from_ids.choices[0].text == reply.choices[0].text
    assert len(reply.choices[0].logprobs.tokens) == 6
    chunks = client.completions.create(prompt=["hello", "bye"], stream=True, **asked)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]


def test_completions_echo_their_prompt(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="default", prompt="hello", echo=True, **LIMITED)
    assert reply.choices[0].text.startswith("hello")


def test_tokenize_and_back(server: Running) -> None:
    reply = server.post("/tokenize", {"prompt": "hello world", "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    back = server.post("/detokenize", {"tokens": reply["tokens"]}).json()
    assert back == {"prompt": "hello world"}
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    tokens = server.post("/tokenize", chat).json()["tokens"]
    prompt = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert "<|im_start|>user\nhello<|im_end|>" in prompt
    assert server.chat("hello").json()["usage"]["prompt_tokens"] == len(tokens)


def test_requests_beside_each_other_get_the_answers_they_get_alone(
    server: Running, data_url: str
) -> None:
    def fields(i: int) -> dict:
        content = question(f"Number {i}", *([data_url] if i % 3 == 0 else []))
        kinds = [{}, {"temperature": 1.0, "seed": i}, {"temperature": 0.7, "top_p": 0.8, "seed": i}]
        return {"messages": content, "max_tokens": 5 + i % 7, "ignore_eos": True, **kinds[i % 3]}

    def ask(i: int) -> dict:
        return server.post("/v1/chat/completions", fields(i)).json()["choices"][0]["message"]

    alone = [ask(i) for i in range(24)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(24))) == alone


def test_errors_reach_the_client_as_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="default", messages=question("?"), temperature=-3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no/such-model", messages=question("?"))
    assert missing.value.param == "model"
