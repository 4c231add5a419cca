"""Tiny random checkpoint folders with every file that a published checkpoint has."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .seeds import SEEDS
from .tiny_tokenizer import TokenizerFiles


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint of one family, and what may be asked of it.

    `config` is written to config.json as it stands ("published" manner) or as Transformers writes
    it back ("saved"). `rename` turns the weight names that Transformers saves into those that the
    authors' checkpoints carry, `repack` does what names alone cannot. `gains` are (pattern,
    standard deviation over the usual one). `processor_kwargs` go with every request. `images` is
    how many a request may hold, up to three; `large` is the size of a picture that the family cuts
    up, where the usual ones are too small for it. A greedy answer holds `distinct` tokens at least.
    Without the packages in `needs` the reference cannot run. `encode` makes the reference's inputs
    (from folder, messages, sounds) where Transformers' own processor cannot. `quiet` are tokens
    that the model must not say, because the reference then looks for media.

    Where the authors' layout is one that Transformers does not read, `publish` makes Opsin's folder
    from the reference's, `served_type` is its model_type, and `merge` makes the reference's folder
    with an adapter (by name) in its weights.

    `oracle` names the module of `tests/oracles` that is the reference where Transformers has none;
    `model_class` is empty then.
    """

    family: str
    variant: str
    model_class: str
    config: Mapping[str, Any]
    tokenizer: TokenizerFiles
    chat_template: str | None = None
    template_file: str = "chat_template.jinja"
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    manner: str = "published"
    rename: Sequence[tuple[str, str]] = ()
    repack: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    gains: Sequence[tuple[str, float]] = ()
    encode: Callable[..., dict[str, Any]] | None = None
    quiet: Sequence[int] = ()
    publish: Callable[[Path, Path], None] | None = None
    merge: Callable[[Path, str, Path], None] | None = None
    served_type: str | None = None
    seed_of: str | None = None
    seed: int | None = None
    images: int = 3
    text_only: bool = True
    two_turns: bool = True
    audio: bool = False
    large: tuple[int, int] | None = None
    distinct: int = 8
    needs: Sequence[str] = ()
    oracle: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """How the case is called in test names."""
        return f"{self.family}-{self.variant}"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(case: Case, folder: Path) -> Path:
    """Fill `folder` with the checkpoint that `case` describes."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", case.config)
    _write_tokenizer(case, folder)
    for name, content in case.files.items():
        _write_json(folder / name, content)
    _write_weights(case, folder)
    if case.manner == "published":
        _write_json(folder / "config.json", case.config)
    if case.generation:
        _write_json(folder / "generation_config.json", case.generation)
    return folder


def _write_tokenizer(case: Case, folder: Path) -> None:
    if "tekken.json" in case.files:
        return
    case.tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(case.tokenizer.config)
    if case.chat_template is not None:
        if case.template_file == "tokenizer_config.json":
            config["chat_template"] = case.chat_template
        elif case.template_file.endswith(".json"):
            _write_json(folder / case.template_file, {"chat_template": case.chat_template})
        else:
            (folder / case.template_file).write_text(case.chat_template, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)


def _write_weights(case: Case, folder: Path) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    if case.oracle:
        _write_oracle_weights(case, folder)
        return
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, case.model_class)._from_config(config, dtype=torch.float32)
    randomise(model, _seed(case), _is_tied(model.config.to_dict()), case.gains)
    if case.quiet:
        with torch.no_grad():
            model.get_output_embeddings().weight[list(case.quiet)] = 0
    model.save_pretrained(folder)
    if not case.rename and case.repack is None:
        return
    path = folder / "model.safetensors"
    weights = load_file(path)
    renamed = {}
    for name, tensor in weights.items():
        new_name = name
        for pattern, replacement in case.rename:
            new_name = re.sub(pattern, replacement, new_name)
        renamed[new_name] = tensor
    if case.repack is not None:
        renamed = case.repack(renamed)
    save_file(renamed, path, metadata={"format": "pt"})


def _write_oracle_weights(case: Case, folder: Path) -> None:
    from safetensors.torch import save_file

    oracle = importlib.import_module(f"tests.oracles.{case.oracle}")
    model = oracle.build(dict(case.config))
    randomise(model, _seed(case), _is_tied(case.config), case.gains)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _seed(case: Case) -> int:
    return SEEDS.get(case.seed_of or case.name, 0) if case.seed is None else case.seed


def _is_tied(settings: Mapping[str, Any]) -> bool:
    inner = settings.get("text_config") or {}
    return bool(settings.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))


ATTENTION = re.compile(r"(q_proj|k_proj|qkv|qkv_proj|wq|wk|query|key)\.weight$")
TOKEN_TABLE = re.compile(r"(embed_tokens|word_embeddings|wte|shared)\.weight$")
NORM = re.compile(r"(norm|ln_|layernorm|layrnorm|ln\d|_ln)[^.]*\.weight$", re.IGNORECASE)
LAYER_SCALE = re.compile(r"(lambda_\d|layer_scale\w*|gamma|ls\d)$")
TABLE = re.compile(r"embed|pos|class|token|quer|latent|newline|separator|extensor")


@torch.no_grad()
def randomise(
    model: nn.Module, seed: int, tied: bool, gains: Sequence[tuple[str, float]] = ()
) -> None:
    """Random weights that keep activations near one, so that every part of the model is heard.

    Matrices are scaled by their fan-in, scales of norms lie around the value the class starts them
    with, biases and tables are small but never zero.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
    }
    done: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        noise = torch.randn(parameter.shape, generator=generator)
        gain = next((value for pattern, value in gains if re.search(pattern, name)), 1.0)
        if NORM.search(name) and parameter.ndim == 1:
            start = 0.0 if bool((parameter == 0).all()) else 1.0
            parameter.copy_(start + 0.2 * gain * noise)
        elif LAYER_SCALE.search(name):
            parameter.copy_(0.7 + 0.2 * gain * noise)
        elif parameter.ndim < 2:
            parameter.copy_(0.1 * gain * noise)
        elif TOKEN_TABLE.search(name):
            # Small beside what the layers add, or a tied model would only echo its last token.
            parameter.copy_((0.12 if tied else 0.3) * gain * noise)
        elif id(parameter) not in matrices and TABLE.search(name) and "experts" not in name:
            parameter.copy_(0.5 * gain * noise)
        else:
            experts = parameter.ndim == 3 and "experts" in name
            fan_in = parameter.shape[-1] if experts else parameter[0].numel()
            sharper = 1.6 if ATTENTION.search(name) else 1.0
            parameter.copy_(sharper * gain * noise / fan_in**0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("_bias") and buffer.is_floating_point():
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("std_scale"):
            buffer.copy_(1 + 0.2 * torch.randn(buffer.shape, generator=generator))
