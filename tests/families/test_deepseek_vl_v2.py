"""DeepSeek-VL2 beyond the generic runner: tiles by count of pictures, places, its cache, names."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from opsin import families, grounding
from opsin.decoder.cache import CacheFormat, PagedCache
from opsin.engine.loop import Engine, EngineLimits
from opsin.errors import CheckpointError
from opsin.families.base import Family, MediaInput
from opsin.prompt.tasks import task_messages

from .checkpoints import Case, write_checkpoint
from .conftest import Lab
from .ours import BLOCK, Ours, answers, relative_error, tokens
from .pictures import picture
from .ported_reference import PortedReference
from .scenes import IMAGE, Scene, text, user
from .zoo import deepseek_vl_v2

PLAIN, LATENT = deepseek_vl_v2.CASES
SIDE = 384
# What the three published checkpoints have in common.
RESOLUTIONS = [(i * SIDE, j * SIDE) for i in range(1, 10) for j in range(1, 10) if i * j <= 9]


@pytest.fixture
def plain(labs: Callable[[Case], Lab]) -> Lab:
    return labs(PLAIN)


@pytest.fixture
def latent(labs: Callable[[Case], Lab]) -> Lab:
    return labs(LATENT)


def published(**text_config: Any) -> Family:
    """The family at the published size of its pictures."""
    config = dict(PLAIN.config)
    config["language_config"] = {**config["language_config"], **text_config}
    config["vision_config"] = {
        "layers": 27,
        "mlp_ratio": 3.7362,
        "model_name": "siglip_so400m_patch14_384",
        "model_type": "vision",
        "patch_size": 14,
        "width": 1152,
    }
    config["projector_config"] = {"model_type": "mlp_projector", "input_dim": 1152}
    return families.load(config, {"candidate_resolutions": RESOLUTIONS})


@pytest.mark.parametrize(
    ("size", "grid"), [((300, 200), (1, 1)), ((1000, 700), (3, 2)), ((500, 2500), (1, 5))]
)
def test_a_published_picture_is_rows_of_fourteen_tokens(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    family = published()
    ready = family.prepare_image(Image.new("RGB", size), {})
    columns, rows = grid
    assert ready.details["grid"] == grid
    assert ready.num_tokens == 14 * 15 + 1 + rows * 14 * (columns * 14 + 1)
    alone = family.prepare_image(Image.new("RGB", size), {"cropping": False})
    assert (alone.details["grid"], alone.num_tokens) == ((1, 1), 2 * 14 * 15 + 1)


def test_the_small_one_keeps_576_values_a_token_and_layer() -> None:
    """The smaller of the two with latent attention; see docs/cache.md."""
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    family = published(use_mla=True, v_head_dim=128, num_hidden_layers=27, **sizes)
    config = family.decoder()
    assert PagedCache.bytes_per_token(config, torch.bfloat16) == 27 * 576 * 2
    eight = PagedCache.bytes_per_token(config, torch.bfloat16, CacheFormat(8, 64))
    assert eight == 27 * (576 + 9 * 2 * 2)


def prepared(lab: Lab, count: int) -> list[MediaInput]:
    large = picture(31, 200, 130)
    scene = Scene(str(count), [user(*[IMAGE] * count, text("Compare."))], [large] * count)
    return lab.ours.prepare(scene).media


def test_a_picture_among_three_has_no_tiles(plain: Lab) -> None:
    few, many = prepared(plain, 2), prepared(plain, 3)
    assert few[0].details["grid"] != (1, 1)
    assert {item.details["grid"] for item in many} == {(1, 1)}
    assert few[0].key != many[0].key
    assert torch.equal(few[0].features["pixel_values"][0], many[0].features["pixel_values"][0])
    again = prepared(plain, 1)  # what was kept of it is as it was
    assert again[0].details["grid"] == few[0].details["grid"]


def test_the_same_picture_alone_and_among_three_in_one_batch(plain: Lab) -> None:
    """What was encoded for one request is not taken for the other."""
    large = picture(31, 200, 130)
    alone = Scene("alone", [user(IMAGE, text("What do you see?"))], [large])
    three = Scene("among", [user(IMAGE, IMAGE, IMAGE, text("Compare."))], [large] * 3)
    expected = [plain.reference.greedy(plain.encode(scene), 12) for scene in (alone, three)]
    with plain.ours.engine() as engine:
        made = answers(engine, [plain.ours.prepare(scene) for scene in (alone, three)], count=12)
    assert [tokens(events) for events in made] == expected


def test_another_model_s_template_is_left_out(plain: Lab, tmp_path: Path) -> None:
    """The smaller one's tokenizer_config.json has one of instructions and responses."""
    shutil.copytree(plain.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    wrong = "{% for message in messages %}### Instruction: {{ message['content'] }}{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": wrong}))
    scene = plain.scenes["one"]
    ids = Ours(plain.case, tmp_path).prepare(scene).token_ids
    assert ids == plain.ours.prompt(scene).token_ids


def test_an_answer_is_read_on_its_own(plain: Lab) -> None:
    """The colon before it does not join its first word."""
    said = plain.ours.processor.tokenizer
    turns = plain.ours.prompt(plain.scenes["turns"])
    assert "<|Assistant|>:A red square." in turns.text
    first = turns.token_ids.index(said.token_to_id("<|Assistant|>"))
    answer = said.encode("A red square.", add_special_tokens=False)
    colon = said.encode(":", add_special_tokens=False)
    assert turns.token_ids[first + 1 : first + 1 + len(colon + answer)] == colon + answer


def test_a_prefix_is_computed_once(latent: Lab) -> None:
    prompt = latent.ours.prompt(latent.scenes["large"])
    expected = latent.reference_greedy("large")[:16]
    with latent.ours.engine() as engine:
        first, second = (answers(engine, [prompt], count=16)[0] for _ in range(2))
    assert tokens(first) == tokens(second) == expected
    assert second[-1].usage.cached_tokens > len(prompt.token_ids) // 2


@pytest.mark.parametrize("bits", [8, 4])
def test_the_cache_may_be_quantised(latent: Lab, bits: int) -> None:
    """Requests together answer as alone; at 8 bits the likeliest first token is the same."""
    limits = EngineLimits(memory=1 << 24, block_size=BLOCK, kv_bits=bits, quantized_kv_start=0)
    prompts = [latent.ours.prompt(latent.scenes[name]) for name in ("one", "turns", "text")]
    with Engine(latent.ours.model, latent.ours.processor, limits) as engine:
        together = [tokens(events) for events in answers(engine, prompts, count=12)]
        alone = [tokens(answers(engine, [prompt], count=12)[0]) for prompt in prompts]
    assert together == alone
    if bits == 8:
        firsts = [latent.reference_greedy(name)[0] for name in ("one", "turns", "text")]
        assert [answer[0] for answer in together] == firsts


def test_queries_may_go_through_a_vector(tmp_path: Path) -> None:
    text_config = {**LATENT.config["language_config"], "q_lora_rank": 24, "n_group": 4}
    text_config |= {"topk_group": 2, "num_experts_per_tok": 3}
    config = {**LATENT.config, "language_config": text_config}
    case = dataclasses.replace(LATENT, variant="queries", config=config, seed=5)
    folder = write_checkpoint(case, tmp_path)
    reference, ours = PortedReference(folder, case.oracle), Ours(case, folder)
    scene = Scene("one", [user(IMAGE, text("What do you see?"))], [picture(1, 90, 70)])
    theirs = reference.logits(reference.inputs(scene.messages, scene.images))
    assert relative_error(ours.logits(ours.prepare(scene)), theirs) < 1e-4


def test_tasks_ask_in_trained_words_and_places_count_a_side_as_999(plain: Lab) -> None:
    processor = plain.ours.processor
    prompt = processor.prepare(
        task_messages(processor.family, "locate", "the dog"), images=[picture(1, 90, 70)]
    )
    assert prompt.text.endswith("<image>\n<|ref|>the dog<|/ref|>.\n\n<|Assistant|>:")
    answer = "<|ref|>the dog<|/ref|><|det|>[[0, 111, 999, 222]]<|/det|>"
    (region,) = grounding.parse(answer, processor, (999, 333))
    assert region.label == "the dog"
    assert region.bounds == pytest.approx((0, 37, 999, 74))


def as_mlx_has_it(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as mlx-vlm converts them: other prefixes, channels last, experts together."""
    made: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in weights.items():
        name = re.sub(r"^language\.", "language_model.", name)
        name = re.sub(r"^vision\.", "vision.vision_tower.", name)
        name = name.replace("view_seperator", "view_separator")
        if value.ndim == 4:
            value = value.permute(0, 2, 3, 1)
        found = re.match(r"(.*)\.experts\.(\d+)\.(.*)", name)
        if found:
            experts.setdefault(f"{found[1]}.switch_mlp.{found[3]}", {})[int(found[2])] = value
        else:
            made[name] = value.contiguous()
    return made | {
        name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()
    }


def test_a_converted_checkpoint_answers_the_same(latent: Lab, tmp_path: Path) -> None:
    shutil.copytree(latent.folder, tmp_path, dirs_exist_ok=True)
    weights = as_mlx_has_it(load_file(tmp_path / "model.safetensors"))
    assert "language_model.model.layers.1.mlp.switch_mlp.up_proj.weight" in weights
    assert "vision.vision_tower.blocks.0.attn.qkv.weight" in weights
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    prompt = latent.ours.prompt(latent.scenes["one"])
    same = Ours(latent.case, tmp_path).logits(prompt)
    assert relative_error(same, latent.ours.logits(prompt)) < 1e-6


def test_pictures_in_one_row_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not known"):
        families.load({**PLAIN.config, "tile_tag": "1D"}, {})
