"""The public functions, as a user calls them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import opsin
from opsin.errors import InputError, NotFoundError, PromptTooLong, UnsupportedMedia
from tests.families.pictures import picture

Loaded = tuple[Any, Any]
SHORT = {"max_tokens": 8, "ignore_eos": True}


def ask(loaded: Loaded, *args: Any, **kwargs: Any) -> opsin.GenerationResult:
    return opsin.generate(*loaded, *args, **{**SHORT, **kwargs})


def test_the_result_carries_what_the_contract_says(loaded: Loaded) -> None:
    result = ask(loaded, "What is this?", picture(1, 90, 70), logprobs=2)
    assert result.finish_reason == "length"
    assert len(result.tokens) == result.generation_tokens == 8
    assert result.token == result.tokens[-1]
    assert result.total_tokens == result.prompt_tokens + 8
    assert result.prompt_tps > 0
    assert result.generation_tps > 0
    assert result.peak_memory > 0
    assert result.timings.encode > 0
    assert result.timings.prefill > 0
    assert result.logprobs is not None
    assert len(result.logprobs) == 8
    assert len(result.logprobs[0].top) == 2
    assert str(result) == result.text
    assert len(result.image_sizes) == 1


def test_every_form_of_a_picture_is_the_same_picture(loaded: Loaded, tmp_path: Path) -> None:
    image = picture(2, 64, 48)
    path = tmp_path / "picture.png"
    image.save(path)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = [image, str(path), path, data, url, np.asarray(image), [image]]
    answers = {ask(loaded, "What?", form).tokens for form in forms}
    assert len(answers) == 1


def test_messages_and_the_shortcut_say_the_same(loaded: Loaded) -> None:
    image = picture(3, 64, 48)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    message = {"role": "user", "content": parts}
    plain = ask(loaded, "What?", image)
    assert ask(loaded, [message]).tokens == plain.tokens
    assert ask(loaded, message).tokens == plain.tokens
    as_object = SimpleNamespace(role="user", content=parts)
    assert ask(loaded, [as_object]).tokens == plain.tokens


def test_a_formatted_prompt_is_taken_as_it_stands(loaded: Loaded) -> None:
    model, processor = loaded
    image = picture(4, 64, 48)
    text = opsin.apply_chat_template(processor, model.config, "What?", num_images=1)
    assert ask(loaded, text, image).tokens == ask(loaded, "What?", image).tokens


def test_streaming_adds_up_to_the_whole(loaded: Loaded) -> None:
    image = picture(5, 64, 48)
    whole = ask(loaded, "What?", image)
    parts = list(opsin.stream_generate(*loaded, "What?", image, **SHORT))
    assert "".join(part.text for part in parts) == whole.text
    assert len(parts) > 2
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason == "length"


def test_closing_a_stream_frees_the_engine(loaded: Loaded) -> None:
    model, _ = loaded
    stream = opsin.stream_generate(*loaded, "What?", max_tokens=4000, ignore_eos=True)
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    ask(loaded, "Next.")
    stats = model.engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["free_blocks"] == stats["num_blocks"]


def test_a_batch_answers_each_as_alone(loaded: Loaded) -> None:
    images = [picture(6, 64, 48), None, [picture(7, 40, 90), picture(8, 50, 50)]]
    prompts = ["What?", "Hello", "Which?"]
    batch = opsin.batch_generate(*loaded, images=images, prompts=prompts, **SHORT)
    alone = [ask(loaded, text, image) for text, image in zip(prompts, images, strict=True)]
    assert [result.tokens for result in batch] == [result.tokens for result in alone]


def test_a_batch_needs_one_picture_for_each_prompt(loaded: Loaded) -> None:
    with pytest.raises(InputError, match="1 images for 2 prompts"):
        opsin.batch_generate(*loaded, images=[None], prompts=["a", "b"])


def test_prepare_inputs_feeds_generate_step(loaded: Loaded) -> None:
    model, processor = loaded
    images = [picture(9, 64, 48), picture(10, 90, 40)]
    inputs = opsin.prepare_inputs(processor, images=images, prompts="What?")
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["pixel_values"].ndim == 2
    ids, pixels, mask = (
        inputs.pop(name) for name in ("input_ids", "pixel_values", "attention_mask")
    )
    steps = opsin.generate_step(ids, model, pixels, mask, max_tokens=8, ignore_eos=True, **inputs)
    pairs = list(steps)
    assert tuple(token for token, _ in pairs) == ask(loaded, "What?", images).tokens
    for token, logprobs in pairs:
        assert logprobs.ndim == 1
        assert int(logprobs.argmax()) == token
        assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-4)


def test_stop_text_never_appears(loaded: Loaded) -> None:
    whole = ask(loaded, "What?", max_tokens=40)
    stop = whole.text[5:7]
    stopped = list(
        opsin.stream_generate(*loaded, "What?", max_tokens=40, ignore_eos=True, stop=stop)
    )
    text = "".join(part.text for part in stopped)
    assert text == whole.text[: whole.text.index(stop)]
    assert stopped[-1].finish_reason == "stop"


def test_sampling_with_a_seed_repeats(loaded: Loaded) -> None:
    hot = {"temperature": 1.5, "seed": 7, "max_tokens": 20}
    first = ask(loaded, "What?", **hot)
    assert ask(loaded, "What?", **hot).tokens == first.tokens
    others = {ask(loaded, "What?", **{**hot, "seed": seed}).tokens for seed in range(4)}
    assert len(others) > 1


def test_other_spellings_of_arguments_work(loaded: Loaded) -> None:
    result = opsin.generate(*loaded, "What?", temp=0.0, max_new_tokens=3, ignore_eos=True)
    assert result.generation_tokens == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temprature": 1}, "temprature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"logprobs": 100}, "logprobs"),
        ({"processor_kwargs": {"pixels": 1}}, "pixels"),
        ({"resize_shape": [0, 5]}, "resize_shape"),
    ],
)
def test_a_wrong_argument_is_named(loaded: Loaded, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        opsin.generate(*loaded, "What?", picture(1, 40, 40), **arguments)


def test_processor_options_reach_the_picture(loaded: Loaded) -> None:
    image = picture(11, 200, 200)
    sizes = [
        ask(loaded, "What?", image, processor_kwargs={"max_pixels": pixels}).image_sizes[0]
        for pixels in (64 * 64, 160 * 160)
    ]
    assert sizes[0] < sizes[1]
    assert ask(loaded, "What?", image, resize_shape=(64, 96)).image_sizes[0] == (96, 64)


def test_a_modality_the_model_lacks_is_refused(loaded: Loaded) -> None:
    with pytest.raises(UnsupportedMedia, match="audio"):
        ask(loaded, "What?", audio="speech.wav")


def test_a_placeholder_in_plain_text_is_refused(loaded: Loaded) -> None:
    with pytest.raises(InputError, match="stands for one"):
        ask(loaded, [{"role": "user", "content": "What is <|image_pad|>?"}])


def test_an_empty_and_an_endless_prompt_are_refused(loaded: Loaded) -> None:
    model, processor = loaded
    limits = {"max_context": 64}
    with pytest.raises(PromptTooLong, match="the model takes 64"):
        opsin.generate(model, processor, "word " * 200, **limits)
    assert (
        opsin.generate(model, processor, "Hi", ignore_eos=True, **limits).finish_reason == "length"
    )


def test_an_unknown_model_says_so() -> None:
    with pytest.raises(NotFoundError, match="was not found"):
        opsin.load("/no/such/folder")


def test_how_keys_are_kept_is_said_when_loading_and_may_be_said_again(folder: Path) -> None:
    kept = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0, "max_kv_size": 64}
    model, processor = opsin.load(str(folder), device="cpu", **kept)
    opsin.generate(model, processor, "Say something", max_tokens=2)
    limits = model.engine.limits
    assert {name: getattr(limits, name) for name in kept} == kept
    opsin.generate(model, processor, "Say something", max_tokens=2, max_kv_size=32)
    assert (model.engine.limits.kv_bits, model.engine.limits.max_kv_size) == (8, 32)
    model.engine.close()
    for wrong, named in (({"kv_bits": 5}, "kv_bits"), ({"max_kv_size": 3}, "max_kv_size")):
        with pytest.raises(InputError) as caught:
            opsin.load(str(folder), device="cpu", **wrong)
        assert caught.value.param == named


def test_device_and_dtype_are_checked(folder: Path) -> None:
    model, _ = opsin.load(str(folder), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    with pytest.raises(InputError, match="dtype"):
        opsin.load(str(folder), dtype="int3")
    with pytest.raises(InputError, match="device"):
        opsin.load(str(folder), device="abacus")


def test_verbose_prints_answer_and_figures(
    loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ask(loaded, "What?", verbose=True)
    printed = capsys.readouterr().out
    assert result.text in printed
    assert "tokens/s" in printed


def test_an_image_file_object_of_bytes_works(loaded: Loaded) -> None:
    buffer = io.BytesIO()
    picture(12, 30, 30).save(buffer, "JPEG")
    assert ask(loaded, "What?", buffer.getvalue()).generation_tokens == 8


def test_exif_orientation_is_applied_once(loaded: Loaded, tmp_path: Path) -> None:
    upright = picture(13, 90, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    upright.rotate(90, expand=True).save(path, exif=exif)
    assert ask(loaded, "What?", str(path)).tokens == ask(loaded, "What?", upright).tokens
