"""The reference: Transformers' own classes run on a checkpoint folder, plainly and in fp32."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from .separate_sounds import separate_features, separate_sounds
from .torchvision_operators import declare

TORCHVISION = declare()

import transformers  # noqa: E402  (asks on import whether torchvision is there)
from transformers.models.auto import processing_auto  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()

# What the decoder of an encoder-decoder starts from: its start token and the forced first one.
DECODER_START = [2, 0]


@dataclass
class Reference:
    """A checkpoint folder as Transformers loads it."""

    folder: Path
    encode: Callable[..., dict[str, Any]] | None = None
    config: Any = field(init=False)

    def __post_init__(self) -> None:
        self.config = transformers.AutoConfig.from_pretrained(self.folder)

    @cached_property
    def model(self) -> Any:
        """The model in fp32, every weight found and every weight used."""
        name = self.config.architectures[0]
        model_class = getattr(transformers, name)
        model, report = model_class.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        wrong = {
            kind: names
            for kind, names in report.items()
            if names and kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if wrong:
            raise AssertionError(f"the checkpoint of the test does not fit {name}: {wrong}")
        model.generation_config = transformers.GenerationConfig(
            pad_token_id=0, eos_token_id=None, do_sample=False, decoder_start_token_id=2
        )
        separate_sounds(model)
        return model.eval()

    @cached_property
    def processor(self) -> Any:
        """The family's processor over the PIL image processor; videos are left out.

        Transformers' video processors need torchvision. A processor insists on having one even for
        a picture, so the check of its parts is switched off here.
        """
        found = _processor_class(self.folder, self.config.model_type)
        lenient = type(
            found.__name__, (found,), {"check_argument_for_proper_class": lambda *_: None}
        )
        parts = [self._part(name) for name in lenient.get_attributes()]
        settings, _ = lenient.get_processor_dict(self.folder)
        processor = lenient.from_args_and_dict(parts, settings)
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        processor.video_processor = SimpleNamespace(num_frames=8, fps=1, merge_size=2)
        return processor

    def _part(self, name: str) -> Any:
        if name == "tokenizer":
            return transformers.AutoTokenizer.from_pretrained(self.folder)
        if name == "image_processor":
            return transformers.AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        if name in ("feature_extractor", "audio_processor"):
            extractor = transformers.AutoFeatureExtractor.from_pretrained(self.folder)
            return separate_features(extractor)
        return None

    def inputs(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        audio: Sequence[Any] = (),
        processor_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Token ids, pixels and the rest, as the checkpoint's template and processor make them.

        `messages` hold parts of type "image", "audio" and "text"; `images` and `audio` fill them in
        order. Tensors have a leading axis of one request.
        """
        if self.encode is not None:
            return self.encode(self.folder, messages, audio)
        if self.processor.chat_template is None:
            return self._bare_inputs(messages, images, audio)
        pictures, sounds = iter(images), iter(audio)
        filled = [
            {**message, "content": [_fill(part, pictures, sounds) for part in message["content"]]}
            for message in messages
        ]
        encoded = self.processor.apply_chat_template(
            filled,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(processor_kwargs or {}),
            add_generation_prompt=messages[-1]["role"] != "assistant",
        )
        return dict(encoded)

    def _bare_inputs(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image],
        audio: Sequence[Any],
    ) -> dict[str, Any]:
        """The inputs of a family without a chat template: placeholders, then the bare prompt."""
        parts = [part for message in messages for part in message["content"]]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        image_token = getattr(self.processor, "image_token", None)
        if image_token and not self.config.is_encoder_decoder:
            text = image_token * len(images) + text
        encoded = self.processor(text=text, images=list(images) or None, return_tensors="pt")
        return dict(encoded)

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits of the whole sequence.  # (tokens, vocab), fp32

        Of an encoder-decoder: those at the decoder's first tokens.
        """
        if self.config.is_encoder_decoder:
            inputs = {**inputs, "decoder_input_ids": torch.tensor([DECODER_START])}
        return self.model(**self._accepted(inputs), use_cache=False).logits[0].float()

    @torch.no_grad()
    def greedy(self, inputs: dict[str, Any], count: int = 64) -> list[int]:
        """The next `count` tokens, the likeliest each time, no token ending it."""
        prompt = inputs["input_ids"].shape[1]
        if self.config.is_encoder_decoder:
            inputs = {**inputs, "decoder_input_ids": torch.tensor([DECODER_START])}
            prompt = len(DECODER_START)
        output = self.model.generate(**self._accepted(inputs), max_new_tokens=count)
        return output[0, prompt:].tolist()

    def _accepted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        known = inspect.signature(self.model.forward).parameters
        accepted = {}
        for name, value in inputs.items():
            if name in known and name != "labels":
                # Some processors give bfloat16, which rounds but must not set the arithmetic.
                floating = isinstance(value, torch.Tensor) and value.is_floating_point()
                accepted[name] = value.float() if floating else value
        return accepted


def _processor_class(folder: Path, model_type: str) -> type:
    """The class that the checkpoint names, else the one of its model type.

    Looked up in the modules themselves: Transformers hides a class where torchvision is missing,
    though it only needs it for an image processor that is not used here.
    """
    if not TORCHVISION:
        # Pixtral's processor asks this module for one function, which the PIL module has too.
        twin = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
        sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", twin)
    names = processing_auto.PROCESSOR_MAPPING_NAMES
    wanted = names.get(model_type)
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).exists():
            wanted = read_json(folder, file).get("processor_class", wanted)
    for name, class_name in sorted(names.items(), key=lambda pair: pair[0] != model_type):
        if class_name != wanted:
            continue
        module = name.replace("-", "_")
        try:
            source = importlib.import_module(f"transformers.models.{module}.processing_{module}")
        except ModuleNotFoundError:
            continue
        return getattr(source, class_name)
    raise LookupError(f"no processor class named {wanted}")


def _fill(part: dict[str, Any], pictures: Any, sounds: Any) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image", "image": next(pictures)}
    if part["type"] == "audio":
        return {"type": "audio", "audio": next(sounds)}
    return part


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint."""
    return json.loads((folder / name).read_text(encoding="utf-8"))
