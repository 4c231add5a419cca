"""MiniCPM-o (arXiv:2408.01800): pictures in slices and sounds, each read into few tokens.

Answers are text: the parts that speak are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.checkpoint.safetensors import StoredTensor
from opsin.decoder.config import DecoderConfig
from opsin.errors import InputError
from opsin.families.backbones import backbone
from opsin.families.base import Encoded, Family, MediaInput, features_of
from opsin.families.clip_shape import clip_config, one_side
from opsin.families.minicpmo_names import MINICPMO_RENAME, resampler_parts
from opsin.families.options import MAX_TILES, whole_option
from opsin.kernels import Kernels
from opsin.media.sampling import Video
from opsin.towers import pixels
from opsin.towers.mel import too_short, whisper_features
from opsin.towers.projectors import MLPProjector
from opsin.towers.query_resampler import QueryResampler
from opsin.towers.slices import slice_grid, sliced_views
from opsin.towers.vit import VisionLayout, VisionTransformer, bucketed_positions, vision_of
from opsin.towers.whisper import WhisperConfig, WhisperEncoder

VISION = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
SOUND = {
    "d_model": 1024,
    "encoder_layers": 24,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}
SHADES = ("mean", "std")
HOP, PIECE = 160, 30 * 16000
PLACES = re.compile(r"\(?<(image|audio)>\./</\1>\)?|<(image)>|<\|(audio)_\d+\|>")


class MiniCPMO(Family):
    """A picture is seen small and, if it is large, in slices; 64 queries read each."""

    modalities = ("image", "audio", "video")
    message_format = "image_token"
    placeholders = {"image": "<image>", "audio": "<|audio_1|>", "video": "<image>"}
    media_tokens = {"image": "<unk>", "audio": "<unk>", "video": "<unk>"}
    stand_ins = {"video": "image"}
    processor_options = ("max_slice_nums",)
    ignored = (r"^tts\.", r"^vpm\.embeddings\.position_ids$")
    rename = MINICPMO_RENAME

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = {**VISION, **(config.get("vision_config") or {})}
        self.sound = {**SOUND, **(config.get("audio_config") or {})}
        self.patch = one_side(self.vision["patch_size"])
        self.queries = int(config.get("query_num", 64))
        # Of the two that there are, only the later one's decoder states the width of its heads.
        self.kind = "qwen3" if self.text_config.get("head_dim") else "qwen2"
        self.pool = int(config.get("audio_pool_step", 5 if self.kind == "qwen3" else 2))

    # The model.

    def apart(self, tensor: StoredTensor) -> Sequence[StoredTensor]:
        return resampler_parts(tensor)

    def decoder(self) -> DecoderConfig:
        text = {**self.text_config, "model_type": self.kind}
        return backbone(text, tied=bool(text.get("tie_word_embeddings", False)))

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        dropped = int(self.config.get("drop_vision_last_layer", True))
        layers = self.vision["num_hidden_layers"] - dropped
        vit = clip_config(self.vision, layers=layers, post_norm=True)
        sound, hidden = self.sound, self.text_config["hidden_size"]
        heard = WhisperConfig(
            mels=sound["num_mel_bins"],
            hidden=sound["d_model"],
            layers=sound["encoder_layers"],
            heads=sound["encoder_attention_heads"],
            mlp_hidden=sound["encoder_ffn_dim"],
            positions=sound["max_source_positions"],
            chunk=self._chunk(),
        )
        heads = max(hidden // 128, 1)
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "resampler": QueryResampler(kernels, vit.hidden, hidden, self.queries, heads),
                "audio": WhisperEncoder(kernels, heard),
                "hearing": MLPProjector(kernels, heard.hidden, hidden, hidden, activation="relu"),
            }
        )

    # What goes in.

    def extra_eos(self) -> tuple[str, ...]:
        return ("<|im_end|>",)

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """Pictures are numbered; a line ends between media and what stands beside them."""
        found = list(PLACES.finditer(text))
        kinds = [place[1] or place[2] or place[3] for place in found]
        if kinds != [self.stand_ins.get(item.kind, item.kind) for item in media]:
            raise InputError(
                f"The prompt has places for {len(found)} media but {len(media)} came",
                why="each <image> and <|audio_1|> in it stands for one, in their order",
                remedy="Send one for each, and leave those words out of plain text",
                param="prompt",
            )
        stated = self.config.get("use_image_id", True)
        numbered = self.processor_config.get("use_image_id", stated)
        written: list[str] = []
        end = pictures = 0
        for place, item in zip(found, media, strict=True):
            shown = item.text
            if item.kind == "image" and numbered:
                shown = f"<image_id>{pictures}</image_id>{shown}"
                pictures += 1
            _add_lines(written, text[end : place.start()], shown)
            end = place.end()
        _add_lines(written, text[end:])
        return "".join(written)

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        stated = self.processor_config.get("max_slice_nums", 9)
        most = whole_option(options, "max_slice_nums", stated, high=MAX_TILES)
        return self._pictures("image", [image], most)

    def prepare_video(self, video: Video, options: Mapping[str, Any]) -> MediaInput:
        """As many pictures, in one piece each unless asked otherwise, and not numbered."""
        most = whole_option(options, "max_slice_nums", 1, high=MAX_TILES)
        return self._pictures("video", [Image.fromarray(frame) for frame in video.frames], most)

    def _pictures(self, kind: str, pictures: Sequence[Image.Image], most: int) -> MediaInput:
        side = int(self.processor_config.get("scale_resolution", 448))
        sliced = bool(self.processor_config.get("slice_mode", True))
        mean, std = (self.processor_config.get(f"norm_{name}", pixels.HALF) for name in SHADES)
        cut, grids, texts = [], [], []
        for picture in pictures:
            grid = slice_grid(picture.size, side, most) if sliced else None
            for view in sliced_views(picture, grid, side, self.patch):
                cut.append(pixels.patchify(pixels.normalised(view, mean, std), self.patch))
                grids.append((view.height // self.patch, view.width // self.patch))
            columns, rows = grid or (0, 0)
            unknown = self.media_token("image") * self.queries
            row = f"<slice>{unknown}</slice>" * columns
            texts.append(f"<image>{unknown}</image>" + "\n".join([row] * rows))
        return MediaInput(
            kind=kind,
            features={"pixel_values": torch.cat(cut)},
            text="\n".join(texts),
            num_tokens=self.queries * len(grids),
            size=pictures[0].size,
            processed_size=pictures[0].size,
            details={"grids": grids},
        )

    def prepare_audio(self, samples: np.ndarray, options: Mapping[str, Any]) -> MediaInput:
        """Heard in pieces of 30 seconds, which the text does not show."""
        del options
        features, counts = {}, []
        for i, start in enumerate(range(0, max(len(samples), 1), PIECE)):
            piece = samples[start : start + PIECE]
            frames = -(-len(piece) // HOP)
            tokens = ((frames - 1) // 2 + 1) // self.pool
            if tokens < 1:
                if i:
                    break
                raise too_short("a tenth of a second")
            padded = np.pad(piece, (0, PIECE - len(piece)))
            heard = whisper_features(padded, mels=self.sound["num_mel_bins"], hop=HOP)
            features[f"audio_features_{i}"] = heard[:, :frames]
            counts.append(tokens)
        return MediaInput(
            "audio", features, self._marked(sum(counts)), sum(counts), details={"counts": counts}
        )

    def _marked(self, tokens: int) -> str:
        """So many tokens of a sound between marks; the earlier model marks each second."""
        second = self._chunk() // self.pool if self.kind == "qwen2" else 0
        most = second or tokens
        counts = [min(most, tokens - start) for start in range(0, tokens, most)]
        unknown = self.media_token("audio")
        return "".join(f"<|audio_start|>{unknown * count}<|audio_end|>" for count in counts)

    def _chunk(self) -> int:
        """The encoder's vectors that see each other, whatever their order."""
        return int(self.config.get("audio_chunk_length", 1.0) * 50)

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        if items[0].kind == "audio":
            return [Encoded(self.heard(towers, item)) for item in items]
        tower = vision_of(towers)
        table = one_side(self.vision["image_size"]) // self.patch
        grids: list[tuple[int, int]] = [grid for item in items for grid in item.details["grids"]]
        places = torch.cat([bucketed_positions(*grid, table, stepped=True) for grid in grids])
        layout = VisionLayout(
            [rows * columns for rows, columns in grids],
            position_embeds=tower.positions(places.to(tower.patch.weight.device)),
        )
        cut = features_of(items, "pixel_values")
        features, _ = tower(cut.to(tower.patch.weight), layout)
        read = towers["resampler"](features, grids)
        counts = [len(item.details["grids"]) for item in items]
        return [Encoded(part.flatten(0, 1)) for part in read.split(counts)]

    def heard(self, towers: nn.ModuleDict, item: MediaInput) -> Tensor:
        """A sound's vectors, `audio_pool_step` of them averaged in each."""
        parts = []
        for features in item.features.values():
            projected = towers["hearing"](towers["audio"](features[None])[0])
            parts.append(F.avg_pool1d(projected.T[None], self.pool)[0].T)
        return torch.cat(parts)


def _add_lines(written: list[str], *pieces: str) -> None:
    """Add pieces, each on a line of its own."""
    for piece in filter(None, pieces):
        apart = written and not written[-1].endswith("\n")
        if apart and not piece.startswith(("\n", "<|im_end|>")):
            written.append("\n")
        written.append(piece)


FAMILY = MiniCPMO
