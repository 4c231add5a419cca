"""Samples to packs of arrays, and the processes that make packs while the device works."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import queue
from multiprocessing.context import ForkProcess
from random import Random
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from training.bundled import fonts, tasks
from training.bundled.page import CELL, PATCH
from training.bundled.sample import Sample

Arrays = dict[str, np.ndarray]
SLOT_BYTES = 48 << 20


class Encoder:
    """Turns conversations into token ids, labels, weights and positions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image_pad = tokenizer.token_to_id("<|image_pad|>")
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of text, special tokens read as such."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _fixed(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.ids(text)
        return self._cache[text]

    def prompt(self, sample: Sample, turn: int) -> str:
        """What stands before the answer of a turn, images as one placeholder each."""
        text = ""
        if turn == 0 and sample.system:
            text = f"<|im_start|>system\n{sample.system}<|im_end|>\n"
        images = "<|vision_start|><|image_pad|><|vision_end|>" * len(sample.pictures)
        question = sample.turns[turn].question
        if turn == 0:
            question = question + images if sample.pictures_last else images + question
        return text + f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"

    def encode(self, sample: Sample, grids: list[tuple[int, int]]) -> Arrays:
        """Arrays of one conversation; grids are rows and columns of visual tokens."""
        ids: list[int] = []
        positions: list[np.ndarray] = []
        labels: list[int] = []
        weights: list[float] = []
        current, picture = 0, 0
        for index, turn in enumerate(sample.turns):
            for token in self.ids(self.prompt(sample, index)):
                if token == self.image_pad:
                    rows, columns = grids[picture]
                    picture += 1
                    placed = _image_positions(rows, columns) + current
                    current += max(rows, columns)
                    count = rows * columns
                else:
                    placed = np.full((3, 1), current)
                    current += 1
                    count = 1
                positions.append(placed)
                ids.extend([token] * count)
                labels.extend([-100] * count)
                weights.extend([0.0] * count)
            answer = [*self.ids(turn.answer), *self._fixed("<|im_end|>")]
            ids.extend([*answer, *self._fixed("\n")])
            labels.extend([*answer, -100])
            weights.extend([1.0 + 8.0 / len(answer)] * len(answer) + [0.0])
            positions.append(np.tile(np.arange(len(answer) + 1) + current, (3, 1)))
            current += len(answer) + 1
        return {
            "ids": np.array(ids, dtype=np.int32),
            "labels": np.array(labels, dtype=np.int32),
            "weights": np.array(weights, dtype=np.float32),
            "positions": np.concatenate(positions, axis=1).astype(np.int32),
        }


def _image_positions(rows: int, columns: int) -> np.ndarray:
    down, across = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([np.zeros(rows * columns, dtype=np.int64), down.ravel(), across.ravel()])


def patch_coordinates(rows: int, columns: int) -> np.ndarray:
    """Row and column of each patch in merge order, # (2, patches); rows, columns in tokens."""
    y = np.arange(rows * 2).reshape(rows, 1, 2, 1)
    x = np.arange(columns * 2).reshape(1, columns, 1, 2)
    shape = (rows, columns, 2, 2)
    return np.stack([np.broadcast_to(y, shape).ravel(), np.broadcast_to(x, shape).ravel()])


def pack(samples: list[Sample], encoder: Encoder) -> Arrays:
    """Arrays of several conversations end to end.

    images holds per image: the offsets of its three planes in pixels, its width in pixels,
    its height and width in patches. # (images, 6)
    """
    pixels: list[np.ndarray] = []
    images, tables, cells, patches, conversations = [], [], [], [], []
    offset = 0
    for sample in samples:
        grids = []
        for picture in sample.pictures:
            planes = picture.planes()
            _, height, width = planes.shape
            step = height * width if len(planes) == 3 else 0
            image = len(images)
            images.append(
                (offset, offset + step, offset + 2 * step, width, height // PATCH, width // PATCH)
            )
            offset += planes.size
            pixels.append(planes.ravel())
            tables.append(picture.table())
            cells.append(picture.cells())
            grid = (height // CELL, width // CELL)
            grids.append(grid)
            where = patch_coordinates(*grid)
            patches.append(np.concatenate([np.full((1, where.shape[1]), image), where]))
        conversations.append(encoder.encode(sample, grids))
    return {
        "pixels": np.concatenate(pixels),
        "images": np.array(images, dtype=np.int64),
        "tables": np.stack(tables),
        "cells": np.concatenate(cells),
        "patches": np.concatenate(patches, axis=1).astype(np.int32),
        "lengths": np.array([len(part["ids"]) for part in conversations], dtype=np.int32),
        **{
            key: np.concatenate([part[key] for part in conversations], axis=-1)
            for key in ("ids", "labels", "weights", "positions")
        },
    }


class Factory:
    """Worker processes that write packs into shared memory slots."""

    def __init__(
        self, tokenizer: Tokenizer, workers: int, samples: int, seed: int, slots: int
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.memory = mmap.mmap(-1, SLOT_BYTES * slots)
        self.free: Any = context.Queue()
        self.ready: Any = context.Queue()
        for slot in range(slots):
            self.free.put(slot)
        fonts.faces("train")  # scanned once, before the processes part
        self.processes: list[ForkProcess] = [
            context.Process(target=self._work, args=(tokenizer, samples, seed + index), daemon=True)
            for index in range(workers)
        ]
        for process in self.processes:
            process.start()

    def _work(self, tokenizer: Tokenizer, samples: int, seed: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encoder = Encoder(tokenizer)
        rng = Random(seed)
        while True:
            arrays = pack([tasks.training_sample(rng) for _ in range(samples)], encoder)
            slot = self.free.get()
            start = slot * SLOT_BYTES
            table = {}
            for key, array in arrays.items():
                end = start + array.nbytes
                if end > (slot + 1) * SLOT_BYTES:
                    raise RuntimeError("a pack outgrew its slot")
                self.memory[start:end] = np.ascontiguousarray(array).tobytes()
                table[key] = (start, array.dtype.str, array.shape)
                start = end + (-end % 64)
            self.ready.put((slot, table))

    def take(self) -> tuple[int, Arrays]:
        """The next pack; its arrays are views that hold until give() gets the slot back."""
        while True:
            try:
                slot, table = self.ready.get(timeout=20)
                break
            except queue.Empty:
                if not any(process.is_alive() for process in self.processes):
                    raise RuntimeError("every worker has ended") from None
        view = memoryview(self.memory)
        return slot, {
            key: np.frombuffer(view, dtype, int(np.prod(shape)), start).reshape(shape)
            for key, (start, dtype, shape) in table.items()
        }

    def give(self, slot: int) -> None:
        """Hands a slot back to the workers."""
        self.free.put(slot)

    def close(self) -> None:
        """Ends the workers."""
        for process in self.processes:
            process.terminate()
