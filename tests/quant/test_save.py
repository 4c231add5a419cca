"""Quantised checkpoints as they are written: MLX's packing, recipes, layouts, and the way back."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import opsin
from opsin import api_quantize
from opsin.checkpoint.shards import Shards
from opsin.engine import model as loading
from opsin.errors import CheckpointError, InputError, NotFoundError
from opsin.families.index import ALIASES, MODULES
from opsin.families.mlx_table import NAMES
from opsin.quant.affine import encode, pack_codes, unpack_codes
from opsin.quant.recipes import RECIPES, Place, bits_of
from tests.families.checkpoints import Case, write_checkpoint
from tests.families.ours import Ours, relative_error
from tests.families.scenes import scenes

from .test_mlx import packed_words
from .widened import widened

DENSE = "qwen2_5_vl-saved_untied"
EXPERTS = "qwen3_vl_moe-every_layer"
# A published name of each family in the table, and the one that mlx-vlm gives its weight.
CALLED = {
    "qwen2_vl-published_tied": ("visual.merger.mlp.0.weight", "vision_tower.merger.mlp.0.weight"),
    "qwen2_5_vl-saved_untied": (
        "model.language_model.layers.1.mlp.up_proj.weight",
        "language_model.model.layers.1.mlp.up_proj.weight",
    ),
    "qwen3_vl_moe-every_layer": (
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "language_model.model.layers.0.mlp.switch_mlp.gate_proj.weight",
    ),
    "qwen3_5_moe-untied": (
        "model.language_model.layers.0.mlp.experts.5.down_proj.weight",
        "language_model.model.layers.0.mlp.switch_mlp.down_proj.weight",
    ),
    "smolvlm-saved_tied": (
        "model.text_model.embed_tokens.weight",
        "language_model.lm_head.weight",
    ),
    "llava_next-vicuna_two_layers": (
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    ),
    "gemma3-published": ("", "language_model.lm_head.weight"),
    "mistral3-untied": (
        "vision_tower.transformer.layers.0.attention.q_proj.weight",
        "vision_tower.vision_model.transformer.layers.0.attention.q_proj.weight",
    ),
    "mllama-two_cross_layers": (
        "vision_model.transformer.layers.0.mlp.fc1.weight",
        "vision_tower.transformer.layers.0.mlp.fc1.weight",
    ),
    "gemma4-experts": (
        "model.language_model.layers.1.experts.down_proj",
        "language_model.model.layers.1.experts.switch_glu.down_proj.weight",
    ),
    "minicpmo-later": ("apm.conv1.weight", "audio_tower.conv1.weight"),
    "deepseek_vl_v2-plain": (
        "language.model.layers.1.mlp.experts.0.up_proj.weight",
        "language_model.model.layers.1.mlp.switch_mlp.up_proj.weight",
    ),
    "internvl_chat-qwen2": ("", "mlp1.1.weight"),
    "llama4-every_layer_moe": (
        "language_model.model.layers.0.feed_forward.experts.gate_up_proj",
        "language_model.model.layers.0.feed_forward.experts.up_proj.weight",
    ),
    "molmo-qwen": ("model.transformer.ff_out.weight", "language_model.model.ff_out.weight"),
    "phi3_v-llama_tokenizer": ("", "model.layers.0.self_attn.qkv_proj.weight"),
    "phi4-siglip-patch16": ("model.mm_projector.2.weight", "mm_projector.linear_2.weight"),
    "dots_ocr-published": ("lm_head.weight", "language_model.model.lm_head.weight"),
}

Written = Callable[[str], tuple[Case, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The widened checkpoint of a case, written once."""

    @functools.cache
    def write(name: str) -> tuple[Case, Path]:
        case = widened(name)
        folder = write_checkpoint(case, tmp_path_factory.mktemp("plain") / "it")
        if case.publish is None:
            return case, folder
        published = tmp_path_factory.mktemp("published")
        case.publish(folder, published)
        return case, published

    return write


def stated(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def bits_in(folder: Path) -> dict[str, int]:
    """The bits of each quantised layer, as config.json states them."""
    config = stated(folder)["quantization"]
    names = load_file(folder / "model.safetensors")
    layers = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
    return {layer: config.get(layer, config)["bits"] for layer in layers}


def logits(case: Case, folder: Path) -> torch.Tensor:
    model = Ours(case, folder, dtype="float32")
    return model.logits(model.prompt(scenes(case)[-1]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (5, 96), generator=generator).to(torch.uint8)
    words = pack_codes(codes, bits)
    assert torch.equal(words.view(torch.int32), packed_words(codes, bits).view(torch.int32))
    assert torch.equal(unpack_codes(words, bits, 96), codes)


def test_the_first_code_of_a_word_has_its_lowest_bits() -> None:
    codes = torch.arange(8, dtype=torch.uint8).repeat(4)[None]
    assert int(pack_codes(codes, 4).view(torch.int32)[0, 0]) == 0x76543210


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_groups_lose_less_than_between_their_extremes(bits: int) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    words, scales, biases = encode(weight, bits, 64, torch.bfloat16)
    codes = unpack_codes(words, bits, 128).float().unflatten(1, (-1, 64))
    ours = (codes * scales.float()[..., None] + biases.float()[..., None]).flatten(1)
    grouped = weight.unflatten(1, (-1, 64))
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    plain = (((grouped - low) / step).round() * step + low).flatten(1)
    assert (ours - weight).square().mean() < 1.15 * (plain - weight).square().mean()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_file_holds_what_mlx_would_read(written: Written, tmp_path: Path, bits: int) -> None:
    """Codes, scales and biases are decoded with numpy alone, by MLX's published layout."""
    _, folder = written(DENSE)
    done = opsin.quantize(folder, tmp_path / "out", bits, 64)
    plain = load_file(folder / "model.safetensors")
    got = load_file(done.folder / "model.safetensors")
    layer = "language_model.model.layers.0.mlp.gate_proj"
    words = got[f"{layer}.weight"].view(torch.int32).numpy().view(np.uint32)
    scales, biases = (got[f"{layer}.{kind}"].float().numpy() for kind in ("scales", "biases"))
    weight = plain["model.language_model.layers.0.mlp.gate_proj.weight"].float().numpy()
    flags = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = flags.reshape(len(weight), -1, bits) @ (1 << np.arange(bits))
    columns = np.arange(weight.shape[1]) // 64
    whole = codes * scales[:, columns] + biases[:, columns]
    assert scales.shape == (weight.shape[0], weight.shape[1] // 64)
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert (np.abs(whole - weight)[inside] <= 0.51 * np.abs(scales[:, columns])[inside]).all()
    assert np.abs(whole - weight).mean() < 0.4 * np.abs(scales).mean()
    assert stated(done.folder)["quantization"] == stated(done.folder)["quantization_config"]
    assert done.num_bytes < done.source_bytes


@pytest.mark.parametrize("name", sorted(CALLED))
def test_both_layouts_answer_alike(written: Written, tmp_path: Path, name: str) -> None:
    case, folder = written(name)
    mlx = opsin.quantize(folder, tmp_path / "mlx", 8).folder
    hf = opsin.quantize(folder, tmp_path / "hf", 8, layout="hf").folder
    names = {*load_file(mlx / "model.safetensors")}
    was, called = CALLED[name]
    assert called in names
    assert not was or was not in names
    sources = {*load_file(folder / "model.safetensors")}
    kept = {
        n for n in load_file(hf / "model.safetensors") if not n.endswith((".scales", ".biases"))
    }
    assert {n.removesuffix(".weight") for n in kept} == {n.removesuffix(".weight") for n in sources}
    got = [logits(case, out) for out in (mlx, hf)]
    assert relative_error(*got) < 1e-3
    for layer, bits in bits_in(mlx).items():
        assert bits == 8, layer


def test_every_kind_of_names_is_tried(written: Written) -> None:
    types = [stated(written(name)[1])["model_type"] for name in CALLED]
    tried = [NAMES[MODULES[ALIASES.get(kind, kind)]] for kind in types]
    assert [family for family, names in NAMES.items() if names not in tried] == []


@pytest.mark.parametrize("name", [DENSE, EXPERTS])
def test_dequantised_codes_are_the_weights_they_stand_for(
    written: Written, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder = written(name)
    coded = opsin.quantize(folder, tmp_path / "coded", 8, 32).folder
    whole = opsin.quantize(coded, tmp_path / "whole", dequantize=True).folder
    assert "quantization" not in stated(whole)
    weights = load_file(whole / "model.safetensors")
    assert not [n for n in weights if n.endswith((".scales", ".biases"))]
    monkeypatch.setattr(loading, "native_library", lambda: None)
    # The weights are rounded to bfloat16 once more.
    assert relative_error(logits(case, coded), logits(case, whole)) < 0.05
    again = opsin.quantize(whole, tmp_path / "again", 8, 32).folder
    assert {*bits_in(again)} == {*bits_in(coded)}


def test_a_checkpoint_of_codes_answers_nearly_as_before(written: Written, tmp_path: Path) -> None:
    case, folder = written(DENSE)
    expected = logits(case, folder)
    while_loading = Ours(case, folder, dtype="float32", quantize=8)
    loaded = while_loading.logits(while_loading.prompt(scenes(case)[-1]))
    stored = logits(case, opsin.quantize(folder, tmp_path / "out", 8, 64).folder)
    assert relative_error(stored, expected) < 0.15
    assert relative_error(stored, loaded) < 0.2


def expected_bits(layer: str, low: int, high: int, layers: int) -> int:
    """What mlx-lm's predicate gives a layer of a Qwen checkpoint, by its name."""
    if layer.startswith("vision_tower"):
        return 8
    if "embed_tokens" in layer or "lm_head" in layer:
        return high
    index = int(layer.split(".layers.")[1].split(".")[0])
    more = index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2
    return high if more and ("v_proj" in layer or "down_proj" in layer) else low


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "moqe"])
def test_recipes_choose_bits_as_mlx_lm_does(written: Written, tmp_path: Path, recipe: str) -> None:
    _, folder = written(DENSE)
    found = bits_in(opsin.quantize(folder, tmp_path / "out", group_size=32, recipe=recipe).folder)
    low, high = map(int, recipe.split("_")[1:]) if recipe != "uniform" else (4, 4)
    layers = stated(folder)["text_config"]["num_hidden_layers"]
    assert found == {layer: expected_bits(layer, low, high, layers) for layer in found}
    assert {"language_model.lm_head", "language_model.model.embed_tokens"} <= {*found}


def test_sensitive_layers_of_a_deep_model() -> None:
    high = [i for i in range(24) if bits_of("mixed_3_6", Place("linear", i, 24, True), 4) == 6]
    assert high == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert bits_of("mixed_3_6", Place("linear", 0, 24), 4) == 3


def test_moqe_quantises_experts_alone(written: Written, tmp_path: Path) -> None:
    _, folder = written(EXPERTS)
    found = bits_in(opsin.quantize(folder, tmp_path / "out", 3, recipe="moqe").folder)
    assert found
    assert all(".switch_mlp." in layer and bits == 3 for layer, bits in found.items())
    with pytest.raises(InputError, match="no experts"):
        opsin.quantize(written(DENSE)[1], tmp_path / "other", recipe="moqe")


def test_encoders_may_stay(written: Written, tmp_path: Path) -> None:
    _, folder = written(DENSE)
    done = opsin.quantize(folder, tmp_path / "out", skip_vision=True).folder
    assert not [layer for layer in bits_in(done) if layer.startswith("vision_tower")]
    plain, got = (load_file(f / "model.safetensors") for f in (folder, done))
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(plain[f"model.visual.{name}"], got[f"vision_tower.{name}"])
    patch = "patch_embed.proj.weight"
    turned = plain[f"model.visual.{patch}"].movedim(1, -1)
    assert torch.equal(turned, got[f"vision_tower.{patch}"])


def test_everything_beside_the_weights_comes_along(written: Written, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(written(DENSE)[1], source)
    (source / "LICENSE").write_text("free")
    (source / "training_args.bin").write_bytes(b"pickled")
    done = opsin.quantize(source, tmp_path / "deep" / "out").folder
    files = {path.name for path in source.iterdir()} - {"training_args.bin"}
    assert {path.name for path in done.iterdir()} == files
    changed = {"config.json", "model.safetensors"}
    for name in files - changed:
        assert (done / name).read_bytes() == (source / name).read_bytes()


def test_large_checkpoints_are_cut_into_shards(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder = written(DENSE)
    whole = opsin.quantize(folder, tmp_path / "whole").folder
    monkeypatch.setattr(api_quantize, "Shards", functools.partial(Shards, shard_bytes=200_000))
    cut = opsin.quantize(folder, tmp_path / "cut").folder
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    tensors = {k: v for file in files for k, v in load_file(cut / file).items()}
    expected = load_file(whole / "model.safetensors")
    assert {*tensors} == {*expected} == {*index["weight_map"]}
    size = sum(value.nbytes for value in tensors.values())
    assert index["metadata"]["total_size"] == size
    assert torch.equal(logits(case, cut), logits(case, whole))


def test_an_interrupted_run_leaves_nothing(written: Written, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opsin.quantize(written(DENSE)[1], tmp_path / "out", on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_the_whole(written: Written, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    opsin.quantize(written(EXPERTS)[1], tmp_path / "out", on_progress=lambda *x: heard.append(x))
    assert heard == sorted(heard)
    assert heard[-1][0] == heard[-1][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "7 bits"),
        ({"group_size": 48}, "groups of 48"),
        ({"recipe": "mixed_1_2"}, "Unknown recipe"),
        ({"layout": "gguf"}, "Unknown layout"),
        ({"recipe": "mixed_3_6", "bits": 8}, "says the bits"),
        ({"dequantize": True}, "nothing that can be dequantised"),
        ({"dequantize": True, "bits": 8}, "takes no bits"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    written: Written, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opsin.quantize(written(DENSE)[1], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_sources_that_cannot_be_read_are_refused(written: Written, tmp_path: Path) -> None:
    _, folder = written(DENSE)
    coded = opsin.quantize(folder, tmp_path / "coded").folder
    with pytest.raises(InputError, match="quantised already"):
        opsin.quantize(coded, tmp_path / "twice")
    with pytest.raises(InputError, match="not empty"):
        opsin.quantize(folder, coded)
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        opsin.quantize(pickled, tmp_path / "out")
    with pytest.raises(NotFoundError):
        opsin.quantize(tmp_path / "no such folder", tmp_path / "out")
    fp8 = tmp_path / "fp8"
    shutil.copytree(folder, fp8)
    config = {**stated(fp8), "quantization_config": {"quant_method": "fp8"}}
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantised already"):
        opsin.quantize(fp8, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_without_names_in_mlx_keeps_its_own(written: Written, tmp_path: Path) -> None:
    case, folder = written("deepseek_vl-untied")
    with pytest.raises(InputError, match="layout hf"):
        opsin.quantize(folder, tmp_path / "out")
    done = opsin.quantize(folder, tmp_path / "out", 8, layout="hf").folder
    assert len(bits_in(done)) > 30
    assert relative_error(logits(case, done), logits(case, folder)) < 0.3
