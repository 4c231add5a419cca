"""Adapters chosen by what a request holds: equal to merged weights, also in one batch."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import write_checkpoint
from .oracle import Reference
from .ours import Ours, answers, relative_error, tokens
from .scenes import scenes
from .zoo import phi

RANKS = {"vision": (4, 8.0), "speech": (3, 7.5)}
ADAPTED = re.compile(r"^(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.weight$")
USES = {"text": None, "one": "vision", "mixed": "vision", "sound": "speech"}
# Transformers' names, then the authors'.
NAMES = (
    (r"(feed_forward_(?:in|out))\.gate_up_proj\.", r"\1.net.0.linear."),
    (r"(feed_forward_(?:in|out))\.down_proj\.", r"\1.net.2."),
    (r"(encoders\.\d+\.self_attn)\.([qkv])_proj\.", r"\1.linear_\2."),
    (r"(encoders\.\d+\.self_attn)\.o_proj\.", r"\1.linear_out."),
    (r"img_projection_up\.", "img_projection.0."),
    (r"img_projection_down\.", "img_projection.2."),
    (r"global_img_feature_extensor$", "glb_GN"),
    (r"sub_img_feature_extensor$", "sub_GN"),
    (r"up_proj_for_speech\.", "audio_projection.speech.0."),
    (r"down_proj_for_speech\.", "audio_projection.speech.2."),
    (r"up_proj_for_vision_speech\.", "audio_projection.vision.0."),
    (r"down_proj_for_vision_speech\.", "audio_projection.vision.2."),
    (ADAPTED.pattern, r"\1.base_layer.weight"),
)


def adapters(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random adapters of every adapted matrix, in the authors' names."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name, weight in weights.items():
        found = ADAPTED.match(name)
        for adapter, (rank, _) in RANKS.items() if found else ():
            shapes = {"A": (rank, weight.shape[1]), "B": (weight.shape[0], rank)}
            for side, shape in shapes.items():
                values = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                made[f"{found[1]}.lora_{side}.{adapter}.weight"] = 0.5 * values
    return made


def authors_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the authors' words."""
    sound = dict(config.pop("audio_config"))
    sound["attention_dim"] = sound.pop("hidden_size")
    sound["attention_heads"] = sound.pop("num_attention_heads")
    sound["linear_units"] = sound.pop("intermediate_size")
    sound["nemo_conv_settings"] = {"conv_channels": sound.pop("nemo_conv_channels")}
    distance = sound.pop("bias_max_distance")
    sound["relative_attention_bias_args"] = {"t5_bias_max_distance": distance}
    vision = config.pop("vision_config")
    return {
        **config,
        "audio_processor": {"config": sound},
        "embd_layer": {"image_embd_layer": vision},
        "model_type": "phi4mm",
        **{f"{name}_lora": {"r": r, "lora_alpha": alpha} for name, (r, alpha) in RANKS.items()},
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """The checkpoint as its authors write it, under None, and with each adapter merged."""
    from safetensors.torch import load_file, save_file

    pytest.importorskip("torchvision")
    case = phi.CASES[0]
    made: dict[str | None, Path] = {}
    for name in (None, "plain", *RANKS):
        folder = write_checkpoint(case, tmp_path_factory.mktemp(str(name)))
        path = folder / "model.safetensors"
        weights = load_file(path)
        low = adapters(weights)
        if name in RANKS:
            rank, alpha = RANKS[name]
            for key in [key for key in weights if ADAPTED.match(key)]:
                stem = key.removesuffix(".weight")
                up, down = (low[f"{stem}.lora_{side}.{name}.weight"] for side in "BA")
                weights[key] = weights[key] + alpha / rank * (up @ down)
        elif name is None:
            for pattern, replacement in NAMES:
                weights = {re.sub(pattern, replacement, k): v for k, v in weights.items()}
            weights |= low
            config = authors_config(json.loads((folder / "config.json").read_text()))
            (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, path, metadata={"format": "pt"})
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def ours(folders: dict[str | None, Path]) -> Ours:
    """The checkpoint with its adapters, as Opsin loads it."""
    return Ours(phi.CASES[0], folders[None])


def test_each_request_is_computed_with_its_adapter(
    ours: Ours, folders: dict[str | None, Path]
) -> None:
    asked = {scene.name: scene for scene in scenes(phi.CASES[0])}
    prompts, expected = [], []
    for name, adapter in USES.items():
        scene = asked[name]
        reference = Reference(folders[adapter or "plain"])
        inputs = reference.inputs(scene.messages, scene.images, scene.audio)
        prompt = ours.prompt(scene)
        error = relative_error(ours.logits(prompt), reference.logits(inputs))
        assert error < 1e-4, name
        prompts.append(prompt)
        expected.append(reference.greedy(inputs, 24))
    with ours.engine(step=64) as engine:
        batch = answers(engine, prompts, count=24)
    assert [tokens(events) for events in batch] == expected


def test_a_prefix_is_not_shared_between_adapters(ours: Ours) -> None:
    scene = next(scene for scene in scenes(phi.CASES[0]) if scene.name == "text")
    plain = dataclasses.replace(ours.prepare(scene), adapter=None)
    plain.token_ids = plain.token_ids * 4
    plain.positions = torch.arange(len(plain.token_ids))[None]
    plain.next_position = len(plain.token_ids)
    other = dataclasses.replace(plain, adapter=1)
    with ours.engine() as engine:
        (alone,) = answers(engine, [other], count=12)
    with ours.engine() as engine:
        answers(engine, [plain], count=12)
        (after,) = answers(engine, [other], count=12)
    assert tokens(after) == tokens(alone)
