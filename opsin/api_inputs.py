"""A prepared prompt as a dictionary of tensors, and back from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.engine.fallback import FallbackModel, FallbackPrompt
from opsin.engine.model import Model
from opsin.errors import InputError
from opsin.families.base import MediaInput, Prompt


class PromptIds(Tensor):
    """Token ids (1, tokens) that know the prompt they are of."""

    prompt: Prompt | None = None


def as_inputs(prompt: Prompt) -> dict[str, Tensor]:
    """input_ids and attention_mask (1, tokens), and the media's features by their names.

    The features of several media lie one after another along the first axis, smaller ones filled up
    with zeros; those of videos have names of their own (`pixel_values_videos`).
    """
    ids = torch.tensor(prompt.token_ids)[None].as_subclass(PromptIds)
    ids.prompt = prompt
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones(ids.shape).long()}
    if isinstance(prompt, FallbackPrompt):
        return {**prompt.inputs, **inputs}
    held: dict[str, list[Tensor]] = {}
    for item in prompt.media:
        for name in item.features:
            held.setdefault(_public(item, name), []).append(_rows(item.value(name)))
    for name, parts in held.items():
        dims = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        inputs[name] = torch.cat([_filled(part, dims) for part in parts])
    return inputs


def from_inputs(model: Model, input_ids: Any, given: Mapping[str, Tensor]) -> Prompt:
    """The prompt that `as_inputs` took apart, with the features as they are now.

    Raises InputError for features without the ids that they belong to.
    """
    known = input_ids.prompt if isinstance(input_ids, PromptIds) else None
    ids = torch.as_tensor(input_ids).flatten().tolist()
    if known is not None and known.token_ids == ids:
        unknown = given.keys() - as_inputs(known).keys()
        if unknown:
            raise InputError(f"{min(unknown)} is not among the prompt's inputs", param=min(unknown))
        if isinstance(known, FallbackPrompt):
            return dataclasses.replace(known, inputs={**known.inputs, **given})
        return dataclasses.replace(known, media=_media(known.media, given))
    if given:
        raise InputError(
            "These input_ids are not the ones that belong to the media",
            why="where media stand in a prompt is known of ids that prepare_inputs made",
            remedy="Pass its input_ids on as they are",
            param="input_ids",
        )
    if isinstance(model, FallbackModel):
        rows = {"input_ids": torch.tensor([ids])}
        return FallbackPrompt(ids, torch.arange(len(ids))[None], len(ids), inputs=rows)
    positions, following = model.family.positions(ids, [])
    return Prompt(ids, positions, following)


def _media(media: Sequence[MediaInput], given: Mapping[str, Tensor]) -> list[MediaInput]:
    """The same media with the features that a caller may have changed."""
    taken = dict.fromkeys(given, 0)
    found = []
    for item in media:
        features, same = dict(item.features), True
        for name in item.features:
            public = _public(item, name)
            if public not in given:
                continue
            value = item.value(name)
            own, start = _rows(value), taken[public]
            taken[public] += len(own)
            places = tuple(slice(size) for size in own.shape[1:])
            now = given[public][start : start + len(own)][(slice(None), *places)]
            features[name] = now.reshape(value.shape)
            same = same and torch.equal(features[name], value)
        # What a tower made of others is kept by this key.
        found.append(item if same else dataclasses.replace(item, features=features, key=b""))
    return found


def _public(item: MediaInput, name: str) -> str:
    """What a feature is called in the dictionary."""
    return f"{name}_videos" if item.kind == "video" else name


def _rows(value: Tensor) -> Tensor:
    """A feature with an axis of its rows in front."""
    return value[None] if value.ndim < 2 else value


def _filled(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows filled up to the sizes of the axes behind the first."""
    missing = [size - own for size, own in zip(sizes, part.shape[1:], strict=True)]
    return F.pad(part, [side for count in reversed(missing) for side in (0, count)])
