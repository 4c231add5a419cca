"""MiniCPM-o against Transformers' and torch's own parts, put together as its authors do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from opsin import families
from opsin.errors import InputError
from opsin.media.sampling import Video, VideoInfo
from opsin.towers.slices import slice_grid, sliced_views

from .checkpoints import Case, randomise
from .ours import Ours, answers, relative_error, tokens
from .pictures import picture, sound
from .scenes import AUDIO, IMAGE, Scene, text, user
from .tiny_tokenizer import byte_level, files

MARKS = ("<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *MARKS,
    "<|audio_start|>",
    "<|audio_end|>",
)
TOKENIZER = files(byte_level(SPECIAL), eos="<|im_end|>", pad="<|endoftext|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WIDTH, QUERIES, PATCH = 128, 6, 14
TEXT = {
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": 160,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": TOKENIZER.size,
}
VISION = {
    "hidden_size": 24,
    "image_size": 140,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": PATCH,
}
SOUND = {
    "d_model": 32,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "encoder_layers": 2,
    "max_source_positions": 1500,
    "num_mel_bins": 80,
}


class Resampler(nn.Module):
    """The authors', for one picture."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(QUERIES, WIDTH))
        self.proj = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.kv_proj = nn.Linear(VISION["hidden_size"], WIDTH, bias=False)
        self.attn = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(3))

    def forward(self, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        x = self.ln_kv(self.kv_proj(x))
        speeds = 10000.0 ** -(np.arange(WIDTH // 4) / (WIDTH // 4))
        places = np.zeros((rows, columns, WIDTH), dtype=np.float32)
        for i in range(rows):
            for j in range(columns):
                waves = [f(place * speeds) for place in (j, i) for f in (np.sin, np.cos)]
                places[i, j] = np.concatenate(waves)
        keys = x + torch.from_numpy(places).view(1, -1, WIDTH)
        read = self.attn(self.ln_q(self.query)[None], keys, x)[0]
        return (self.ln_post(read) @ self.proj)[0]


class Pieces(nn.Module):
    """The parts, by their published names."""

    def __init__(self, later: bool) -> None:
        super().__init__()
        from transformers import (
            Qwen2Config,
            Qwen2ForCausalLM,
            Qwen3Config,
            Qwen3ForCausalLM,
            WhisperConfig,
        )
        from transformers.models.idefics2.modeling_idefics2 import (
            Idefics2VisionConfig,
            Idefics2VisionTransformer,
        )
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        if later:
            self.llm: Any = Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=32))
        else:
            self.llm = Qwen2ForCausalLM(Qwen2Config(**TEXT))
        layers = {"num_hidden_layers": VISION["num_hidden_layers"] - later}
        vision = Idefics2VisionConfig(**{**VISION, **layers})
        heard = WhisperConfig(**SOUND)
        vision._attn_implementation = heard._attn_implementation = "eager"
        self.vpm, self.apm = Idefics2VisionTransformer(vision), WhisperEncoder(heard)
        self.resampler = Resampler()
        self.audio_projection_layer = nn.Module()
        self.audio_projection_layer.linear1 = nn.Linear(SOUND["d_model"], WIDTH)
        self.audio_projection_layer.linear2 = nn.Linear(WIDTH, WIDTH)

    def see(self, image: Image.Image) -> torch.Tensor:
        found = []
        for view in sliced_views(image, slice_grid(image.size, 56, 9), 56, PATCH):
            values = torch.from_numpy(np.asarray(view, dtype=np.float32) / 255 * 2 - 1)
            rows, columns = view.height // PATCH, view.width // PATCH
            seen = self.vpm(
                values.permute(2, 0, 1)[None],
                patch_attention_mask=torch.ones(1, rows, columns, dtype=torch.bool),
            ).last_hidden_state
            found.append(self.resampler(seen, rows, columns))
        return torch.cat(found)

    def hear(self, samples: np.ndarray) -> torch.Tensor:
        from transformers import WhisperFeatureExtractor

        made = WhisperFeatureExtractor(feature_size=80)(
            samples, sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
        )
        frames = int(made["attention_mask"].sum())
        x = F.gelu(self.apm.conv1(made["input_features"][:, :, :frames]))
        x = F.gelu(self.apm.conv2(x)).transpose(1, 2)
        count = x.shape[1]
        x = x + self.apm.embed_positions.weight[:count]
        second = torch.arange(count) // 50
        mask = torch.zeros(count, count).masked_fill(second[None] > second[:, None], -torch.inf)
        for layer in self.apm.layers:
            made = layer(x, mask[None, None])
            x = made[0] if isinstance(made, tuple) else made
        p = self.audio_projection_layer
        x = p.linear2(F.relu(p.linear1(self.apm.layer_norm(x))))
        return F.avg_pool1d(x.transpose(1, 2), 5)[0].T


@pytest.fixture(scope="module", params=[True, False], ids=["4.5", "2.6"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pieces, Ours]:
    """The parts, and Opsin with the same weights."""
    folder: Path = tmp_path_factory.mktemp("minicpmo")
    pieces = Pieces(request.param).eval()
    randomise(pieces, 3, tied=False)
    weights = {name: value.clone() for name, value in pieces.state_dict().items()}
    save_file({**weights, "tts.emb_text.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    config = {
        **TEXT,
        **({"head_dim": 32} if request.param else {}),
        "architectures": ["MiniCPMO"],
        "audio_chunk_length": 1.0,
        "audio_config": SOUND,
        "audio_pool_step": 5,
        "drop_vision_last_layer": request.param,
        "model_type": "minicpmo",
        "query_num": QUERIES,
        "use_image_id": True,
        "vision_config": VISION,
    }
    settings = {"max_slice_nums": 9, "patch_size": PATCH, "scale_resolution": 56}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    TOKENIZER.tokenizer.save(str(folder / "tokenizer.json"))
    named = {**TOKENIZER.config, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return pieces, Ours(Case("minicpmo", "parts", "", config, TOKENIZER), folder)


def shown(number: int, columns: int = 0, rows: int = 0) -> str:
    """The text of a picture, as the authors write it."""
    unknown = "<unk>" * QUERIES
    slices = "\n".join([f"<slice>{unknown}</slice>" * columns] * rows)
    return f"<image_id>{number}</image_id><image>{unknown}</image>{slices}"


def asked(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


IMAGES = [picture(1, 200, 90), picture(2, 30, 30), picture(3, 60, 150)]
VOICE = sound(4, 2.3)
# 230 frames are 115 vectors are 23 tokens; the earlier model marks every ten.
HEARD = {
    True: "<|audio_start|>" + "<unk>" * 23 + "<|audio_end|>",
    False: "".join(f"<|audio_start|>{'<unk>' * n}<|audio_end|>" for n in (10, 10, 3)),
}


def scenes(later: bool) -> list[tuple[Scene, str]]:
    wide, tall = shown(0, 3, 2), shown(2, 1, 3)
    voice = HEARD[later]
    return [
        (Scene("text", [user(text("What?"))]), "What?"),
        (Scene("one", [user(IMAGE, text("What?"))], IMAGES[:1]), wide + "\nWhat?"),
        (
            Scene("three", [user(IMAGE, text("and"), IMAGE, IMAGE, text("?"))], IMAGES),
            f"{wide}\nand\n{shown(1)}\n{tall}\n?",
        ),
        (Scene("sound", [user(AUDIO, text("What?"))], [], [VOICE]), voice + "\nWhat?"),
        (
            Scene("mixed", [user(text("See"), AUDIO, IMAGE)], IMAGES[1:2], [VOICE]),
            f"See\n{voice}\n{shown(0)}",
        ),
    ]


@torch.no_grad()
def test_logits_are_the_parts(both: tuple[Pieces, Ours]) -> None:
    pieces, ours = both
    later = "head_dim" in ours.case.config
    prompts = {}
    for scene, content in scenes(later):
        prompts[scene.name] = prompt = ours.prepare(scene)
        assert prompt.text == asked(content), scene.name
        ids = torch.tensor(TOKENIZER.tokenizer.encode(asked(content)).ids)
        assert prompt.token_ids == ids.tolist()
        media = [*map(pieces.hear, scene.audio), *map(pieces.see, scene.images)]
        embeds = pieces.llm.model.embed_tokens(ids)
        if media:
            embeds[ids == TOKENIZER.ids["<unk>"]] = torch.cat(media)
        expected = pieces.llm(inputs_embeds=embeds[None]).logits[0]
        assert relative_error(ours.logits(prompt), expected) < 1e-4, scene.name
    with ours.engine(step=16) as engine:
        together = answers(engine, list(prompts.values()), count=8)
        for prompt, events in zip(prompts.values(), together, strict=True):
            (alone,) = answers(engine, [prompt], count=8)
            assert tokens(events) == tokens(alone)


def test_media_and_their_places_must_agree(both: tuple[Pieces, Ours]) -> None:
    _, ours = both
    with pytest.raises(InputError, match="places for 1 media but 2"):
        ours.processor.prepare(asked("<image>\nWhat?"), images=IMAGES[:2])
    with pytest.raises(InputError, match="too short"):
        ours.processor.prepare("What?", audios=[np.zeros(900, dtype=np.float32)])


@pytest.mark.parametrize(
    ("size", "grid", "first", "each"),
    [
        ((448, 448), None, (448, 448), None),
        ((30, 30), None, (448, 448), None),
        ((1920, 1080), (4, 2), (602, 336), (420, 476)),
        ((1080, 1920), (2, 4), (336, 602), (476, 420)),
        ((3000, 40), None, (3822, 56), None),
        ((800, 600), (2, 2), (518, 392), (518, 392)),
        ((5000, 100), (4, 1), (3150, 56), (1568, 126)),
    ],
)
def test_slices_are_the_authors(
    size: tuple[int, int], grid: Any, first: tuple[int, int], each: Any
) -> None:
    """The numbers are what the authors' image processor gives."""
    assert slice_grid(size, 448, 9) == grid
    views = [view.size for view in sliced_views(Image.new("RGB", size), grid, 448, 14)]
    assert views == [first] + [each] * (grid[0] * grid[1] if grid else 0)


def test_a_long_sound_is_heard_in_pieces_of_thirty_seconds() -> None:
    family = families.load({**TEXT, "head_dim": 32, "model_type": "minicpmo"}, {})
    made = family.prepare_audio(np.zeros(61 * 16000, dtype=np.float32), {})
    assert made.details["counts"] == [300, 300, 10]
    assert made.text == "<|audio_start|>" + "<unk>" * 610 + "<|audio_end|>"


def test_a_video_is_pictures_without_numbers(both: tuple[Pieces, Ours]) -> None:
    _, ours = both
    frames = np.stack([np.asarray(picture(seed, 120, 60)) for seed in (5, 6)])
    info = VideoInfo(num_frames=2, fps=1.0, duration=2.0, width=120, height=60)
    video = Video(frames, (0.0, 1.0), (0, 1), info)
    made = ours.processor.family.prepare_video(video, {})
    assert made.text == "\n".join(["<image>" + "<unk>" * QUERIES + "</image>"] * 2)
    expanded = ours.processor.family.expand(asked("<image>What?"), [made])
    assert expanded == asked(made.text + "\nWhat?")
    (encoded,) = ours.processor.family.encode(ours.model.towers, [made])
    assert encoded.embeds is not None
    assert encoded.embeds.shape == (made.num_tokens, WIDTH)
