"""Models without a family run through Transformers: same answers, streamed, stopped, refused."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import opsin
from opsin.cli.models import inspection
from opsin.engine.fallback import FallbackEngine, FallbackModel, FallbackPrompt
from opsin.errors import EngineError, InputError, MissingDependency, UnknownFamily
from opsin.types import Event, SamplingParams

from ..families.checkpoints import Case, write_checkpoint
from ..families.pictures import picture
from ..families.tiny_tokenizer import files, sentencepiece_like
from ..families.zoo import templates
from ..families.zoo.llava import GENERATION, TOKENIZER, clip_preprocessor, clip_vision, llama_text

PLAIN = files(sentencepiece_like(special=("<image>", "<pad>")), bos="<s>", eos="</s>", pad="<pad>")
QUESTION = "Describe the picture in detail."


def vipllava() -> Case:
    return Case(
        "vipllava",
        "fallback",
        "VipLlavaForConditionalGeneration",
        {
            "architectures": ["VipLlavaForConditionalGeneration"],
            "model_type": "vipllava",
            "image_token_index": TOKENIZER.ids["<image>"],
            "image_seq_length": 9,
            "text_config": llama_text(),
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "vision_config": clip_vision(),
            "vision_feature_layers": [-2, -3],
        },
        TOKENIZER,
        templates.LLAVA,
        files={
            "preprocessor_config.json": clip_preprocessor("CLIPImageProcessor", 42),
            "processor_config.json": {
                "image_token": "<image>",
                "num_additional_image_tokens": 1,
                "patch_size": 14,
                "processor_class": "LlavaProcessor",
                "vision_feature_select_strategy": "default",
            },
        },
        generation=GENERATION,
    )


def _git() -> Case:
    return Case(
        "git",
        "fallback",
        "GitForCausalLM",
        {
            "architectures": ["GitForCausalLM"],
            "model_type": "git",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 32,
            "intermediate_size": 60,
            "max_position_embeddings": 256,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "torch_dtype": "float32",
            "vision_config": {**clip_vision(), "model_type": "git_vision_model"},
            "vocab_size": TOKENIZER.size + 2,
        },
        TOKENIZER,
        files={
            "preprocessor_config.json": clip_preprocessor(
                "CLIPImageProcessor", 42, processor_class="GitProcessor"
            ),
            "processor_config.json": {"processor_class": "GitProcessor"},
        },
    )


def _blip2() -> Case:
    return Case(
        "blip-2",
        "fallback",
        "Blip2ForConditionalGeneration",
        {
            "architectures": ["Blip2ForConditionalGeneration"],
            "model_type": "blip-2",
            "image_token_index": TOKENIZER.ids["<image>"],
            "num_query_tokens": 5,
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "encoder_hidden_size": 32,
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
            },
            "text_config": {
                "model_type": "opt",
                "bos_token_id": 1,
                "eos_token_id": 2,
                "ffn_dim": 60,
                "hidden_size": 32,
                "max_position_embeddings": 256,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "vocab_size": TOKENIZER.size + 2,
                "word_embed_proj_dim": 32,
            },
            "torch_dtype": "float32",
            "vision_config": {
                "model_type": "blip_2_vision_model",
                "hidden_size": 32,
                "image_size": 42,
                "intermediate_size": 60,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "patch_size": 14,
            },
        },
        PLAIN,
        files={
            "preprocessor_config.json": {
                **clip_preprocessor("BlipImageProcessor", 42, processor_class="Blip2Processor"),
                "size": {"height": 42, "width": 42},
            },
            "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": 5},
        },
    )


@pytest.fixture(scope="module", params=[vipllava, _git, _blip2], ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of a model that has no family."""
    case = request.param()
    return write_checkpoint(case, tmp_path_factory.mktemp("fallback") / case.family)


def reference_tokens(model: Any, prompt: FallbackPrompt, count: int) -> list[int]:
    """What the model's own greedy `generate` says, the prompt left out."""
    own = model.reference
    with torch.inference_mode():
        said = own.generate(
            **prompt.inputs, max_new_tokens=count, do_sample=False, eos_token_id=None
        )[0].tolist()
    return said[-count:]


def test_answers_are_the_model_s_own(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "opsin"):
        model, processor = opsin.load(str(folder), device="cpu")
    assert isinstance(model, FallbackModel)
    assert any("slow path" in record.message for record in caplog.records)
    asked = [{"role": "user", "content": QUESTION}]
    prompt = processor.prepare(asked, images=[picture(1, 90, 70)])
    assert isinstance(prompt, FallbackPrompt)
    assert "pixel_values" in prompt.inputs
    answer = opsin.generate(
        model, processor, asked, picture(1, 90, 70), max_tokens=12, ignore_eos=True
    )
    assert list(answer.tokens) == reference_tokens(model, prompt, 12)
    assert answer.finish_reason == "length"
    assert answer.text
    inputs = opsin.prepare_inputs(processor, [picture(1, 90, 70)], prompts=asked)
    assert "pixel_values" in inputs
    ids = inputs.pop("input_ids")
    said = opsin.generate_step(ids, model, **inputs, max_tokens=12, ignore_eos=True)
    assert [token for token, _ in said] == list(answer.tokens)
    model.engine.close()
    facts = inspection(str(folder), None, ["64x64"], 1024)
    assert facts["parameters"] == model.num_parameters
    assert facts["takes"] == ["text", "image"]
    assert "slow path" in facts["cpu"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """One of the models, with its processor."""
    folder = write_checkpoint(vipllava(), tmp_path_factory.mktemp("fallback") / "one")
    return opsin.load(str(folder), device="cpu")


def test_batches_streams_and_seeds(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    options: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    pictures = [picture(1, 60, 50), None]
    both = opsin.batch_generate(model, processor, pictures, [QUESTION, "Hello"], **options)
    assert [result.generation_tokens for result in both] == [8, 8]
    alone = opsin.stream_generate(model, processor, QUESTION, pictures[0], **options)
    assert "".join(part.text for part in alone) == both[0].text
    drawn = [
        opsin.generate(model, processor, "Hello", temperature=1.0, seed=3, **options).tokens
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] != both[1].tokens
    words = processor.prepare("Hello").token_ids
    steps = list(opsin.generate_step(words, model, max_tokens=8, ignore_eos=True))
    assert [token for token, _ in steps] == list(both[1].tokens)


def test_cancelled_and_refused_requests(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    prompt = processor.prepare("Hello")
    first: list[Event] = []
    second: list[Event] = []
    engine = FallbackEngine(model, processor)
    long = SamplingParams(max_tokens=2000, ignore_eos=True)

    def cancel_both(event: Event) -> None:
        first.append(event)
        if len(first) == 3:
            engine.cancel(ids[1])
            engine.cancel(ids[0])

    ids: list[int] = []
    with engine._wake:  # the first must not begin before both are there
        ids.append(engine.submit(prompt, long, cancel_both))
        ids.append(engine.submit(prompt, long, second.append))
        assert engine.stats()["waiting"] == 2
    engine.stream(prompt, SamplingParams(max_tokens=1)).__iter__().__next__()
    assert first[-1].finish_reason == "cancelled"
    assert len(first) < 10
    assert [event.finish_reason for event in second] == ["cancelled"]
    engine.close()
    assert not engine.alive
    with pytest.raises(EngineError):
        engine.submit(prompt, long, first.append)
    with pytest.raises(InputError, match="Unknown processor option"):
        processor.prepare("Hello", options={"max_pixels": 1})
    with pytest.raises(InputError, match="own processor refuses"):
        processor.prepare("<s>USER: <image>\nWhat?", images=[picture(1, 9, 9)] * 2)


def test_without_the_extra_the_remedy_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "git"}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency) as caught:
        opsin.load(str(tmp_path))
    assert "opsin[transformers]" in str(caught.value.remedy)
    assert "git" in str(caught.value)


def test_weights_that_are_not_packed_cannot_be_kept(folder: Path, tmp_path: Path) -> None:
    for where in ("on", str(tmp_path)):
        with pytest.raises(UnknownFamily):
            opsin.load(str(folder), device="cpu", repacked_cache=where)


def test_a_type_that_nobody_knows_stays_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(UnknownFamily, match="no_such_model"):
        opsin.load(str(tmp_path))
