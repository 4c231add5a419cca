"""InternVL upon the text models that its authors' checkpoints carry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin.errors import CheckpointError

from .checkpoints import Case, randomise
from .conftest import Lab
from .ours import Ours, answers, relative_error, tokens
from .pictures import picture
from .scenes import one_image
from .test_internvl_chat import chat_config, repacked
from .zoo import CASES

# For each text model, the class in Transformers that gives the same logits, and config keys.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "internlm2": ("LlamaForCausalLM", {"bias": False}),
    "llama": ("LlamaForCausalLM", {}),
    "phi3": (
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 1024,
            "rope_scaling": {
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "type": "su",
            },
            "sliding_window": 262144,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "internlm3": ("LlamaForCausalLM", {"qkv_bias": False, "bias": False, "head_dim": 8}),
}
HEADS, GROUPS = 6, 2


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Llama's weights as InternLM 2 names and lays them out, one group of heads after another."""
    names = {
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "lm_head": "output",
    }
    found = {}
    for name, weight in weights.items():
        if "q_proj" in name:
            dim = len(weight) // HEADS
            key, value = (weights[name.replace("q_proj", part)] for part in ("k_proj", "v_proj"))
            rows = []
            for group in range(GROUPS):
                for head in range(HEADS // GROUPS):
                    at = (group * (HEADS // GROUPS) + head) * dim
                    rows.append(weight[at : at + dim])
                rows.append(key[group * dim : (group + 1) * dim])
                rows.append(value[group * dim : (group + 1) * dim])
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
        elif "k_proj" not in name and "v_proj" not in name:
            new = name
            for old, theirs in names.items():
                new = new.replace(old, theirs)
            found[new] = weight
    return found


@dataclass
class Built:
    """Our model of a folder, and the reference of its text model."""

    ours: Ours
    reference: Any
    folder: Path


@pytest.fixture(params=MODELS)
def built(request: pytest.FixtureRequest, labs: Callable[[Case], Lab], tmp_path: Path) -> Built:
    """A tiny InternVL in the authors' layout with each of the text models."""
    import transformers

    lab = labs(next(case for case in CASES if case.name == "internvl-small"))
    class_name, changes = MODELS[request.param]
    width = lab.case.config["text_config"]["hidden_size"]
    text = {
        "vocab_size": lab.case.config["text_config"]["vocab_size"],
        "hidden_size": width,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **changes,
    }
    if request.param == "phi3":
        text |= {"num_attention_heads": 4}  # six frequencies a head
    model_class = getattr(transformers, class_name)
    settings = {k: v for k, v in text.items() if k not in ("bias", "qkv_bias")}
    if settings["rope_scaling"]:
        original = settings["original_max_position_embeddings"]
        longer = {"original_max_position_embeddings": original}
        settings["rope_scaling"] = {**settings["rope_scaling"], **longer}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        settings[name] = 0
    reference = model_class._from_config(model_class.config_class(**settings)).eval()
    randomise(reference, 5, tied=False)
    weights = dict(reference.state_dict())
    folder = tmp_path / "chat"
    shutil.copytree(lab.folder, folder)
    vision = {
        name: value
        for name, value in repacked(load_file(folder / "model.safetensors")).items()
        if not name.startswith("language_model.")
    }
    named = fused(weights) if request.param == "internlm2" else weights
    save_file(
        {**vision, **{f"language_model.{name}": v.contiguous() for name, v in named.items()}},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = chat_config(dict(lab.case.config))
    config["llm_config"] = {**text, "model_type": request.param}
    config["template"] = "phi3-chat" if request.param == "phi3" else "internlm2-chat"
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    return Built(Ours(lab.case, folder), reference, folder)


def test_text_and_pictures_are_the_reference_s(built: Built) -> None:
    """The tower is tested elsewhere: its embeddings are ours, all after them is the reference."""
    ours, reference = built.ours, built.reference
    prompts, greedy = [], []
    for name, image in (("one", picture(1, 90, 70)), ("wide", picture(2, 120, 40))):
        prompt = ours.prepare(one_image(name, image))
        model = ours.model
        (encoded,) = model.family.encode(model.towers, prompt.media)
        embeds = reference.get_input_embeddings()(torch.tensor([prompt.token_ids])).detach()
        embeds[0, prompt.media[0].indices] = encoded.embeds
        with torch.no_grad():
            expected = reference(inputs_embeds=embeds, use_cache=False).logits[0]
            answer = reference.generate(
                inputs_embeds=embeds, max_new_tokens=64, do_sample=False, eos_token_id=None
            )
        assert relative_error(ours.logits(prompt), expected) < 1e-4
        prompts.append(prompt)
        greedy.append(answer[0].tolist())
    with ours.engine(step=33) as engine:
        batch = answers(engine, prompts)
    assert [tokens(events) for events in batch] == greedy


def test_the_conversation_is_that_of_the_text_model(built: Built) -> None:
    text = built.ours.prepare(one_image("one", picture(1, 90, 70))).text
    config = json.loads((built.folder / "config.json").read_text())
    phi = config["template"] == "phi3-chat"
    assert text.startswith("<|user|>\n<img>" if phi else "<|im_start|>user\n<img>")
    assert text.endswith("<|assistant|>\n" if phi else "<|im_start|>assistant\n")


def test_a_text_model_that_is_not_known_is_named(built: Built) -> None:
    config = json.loads((built.folder / "config.json").read_text())
    config["llm_config"]["model_type"] = "gpt_oss"
    (built.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gpt_oss"):
        Ours(built.ours.case, built.folder)
