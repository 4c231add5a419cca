"""Answers questions about pictures with a checkpoint folder through Transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText

from training.bundled.page import CELL, PATCH, smart_resize


def preprocess(image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
    """Patches as Qwen2-VL's image processor makes them, # (patches, 1536), and the token grid."""
    rows, columns = smart_resize(image.height, image.width)
    sized = image.convert("RGB").resize((columns, rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(sized, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    high, wide = rows // CELL, columns // CELL
    patches = pixels.reshape(3, high, 2, PATCH, wide, 2, PATCH).transpose(1, 4, 2, 5, 0, 3, 6)
    flat = patches.reshape(high * wide * 4, 3, 1, PATCH * PATCH)
    return torch.from_numpy(flat).expand(-1, -1, 2, -1).reshape(len(flat), -1), (high, wide)


class TransformersEngine:
    """Greedy answers, several at a time."""

    def __init__(
        self, folder: str, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()
        self.device = torch.device(device)
        self.dtype = dtype
        self.pad = self.tokenizer.token_to_id("<|endoftext|>")
        self.image_pad = self.tokenizer.token_to_id("<|image_pad|>")

    def _prompt(self, question: str, grids: list[tuple[int, int]]) -> list[int]:
        images = "".join(
            f"<|vision_start|>{'<|image_pad|>' * (high * wide)}<|vision_end|>"
            for high, wide in grids
        )
        text = f"<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n"
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @torch.inference_mode()
    def answer(
        self, images: list[list[Image.Image]], questions: list[str], max_tokens: int = 640
    ) -> list[str]:
        """One answer for each list of pictures and its question."""
        patches, grids, prompts = [], [], []
        for pictures, question in zip(images, questions, strict=True):
            made = [preprocess(picture) for picture in pictures]
            patches.extend(values for values, _ in made)
            grids.extend(grid for _, grid in made)
            prompts.append(self._prompt(question, [grid for _, grid in made]))
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids = ids.to(self.device)
        vision = {}
        if patches:
            shape = torch.tensor([(1, 2 * high, 2 * wide) for high, wide in grids])
            vision["pixel_values"] = torch.cat(patches).to(self.device, self.dtype)
            vision["image_grid_thw"] = shape.to(self.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask.to(self.device),
            mm_token_type_ids=(ids == self.image_pad).int(),
            max_new_tokens=max_tokens,
            do_sample=False,
            **vision,
        )
        return self.tokenizer.decode_batch(out[:, longest:].tolist(), skip_special_tokens=True)
