"""The command line as a person runs it: a process, its output and its exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opsin.cli.generate import split_words
from opsin.errors import InputError
from tests.families.checkpoints import write_checkpoint
from tests.families.pictures import picture
from tests.families.zoo.qwen import CASES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a picture beside its files."""
    case = next(case for case in CASES if case.family == "qwen3_vl")
    folder = write_checkpoint(case, tmp_path_factory.mktemp("cli"))
    picture(1, 90, 60).save(folder / "picture.png")
    return folder


def opsin(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsin", *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def test_an_answer_as_json(folder: Path) -> None:
    image = folder / "picture.png"
    words = ("generate", "-m", folder, "--image", image, "What?", "--max-tokens", "4")
    done = opsin(*words, "--format", "json", "--processor-kwargs", '{"max_pixels": 4096}')
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["usage"]["generation_tokens"] <= 4
    assert answer["image_sizes"][0][0] * answer["image_sizes"][0][1] <= 4096
    assert set(answer["timings"]) >= {"fetch", "decode", "preprocess", "encode", "prefill"}


def test_an_answer_as_text_with_figures_from_a_prompt_on_stdin(folder: Path) -> None:
    words = ("run", "--model", folder, folder / "picture.png", "-", "--max-tokens", "4")
    done = opsin(*words, "--verbose", "--system", "Be brief.", stdin="What is this?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "tokens/s" in done.stderr
    assert "Peak memory" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["generate"], 2, "There is no prompt"),
        (["generate", "x", "--max-tokens", "0"], 2, "max_tokens"),
        (["generate", "x", "--processor-kwargs", "{"], 2, "not valid JSON"),
        (["generate", "x", "--format", "xml"], 2, "Use text or json"),
        (["generate", "x", "--image", "missing.png"], 2, "no such file"),
        (["generate", "x", "--image", "FOLDER"], 2, "irectory"),
        (["generate", "x", "--image", "FOLDER/config.json"], 2, "not a picture"),
        (["generate", "x", "--image", "FOLDER/truncated.png"], 2, "truncated.png"),
        (["generate", "x", "-m", "/no/such/model"], 3, "was not found"),
        (["models", "inspect", "FOLDER", "--image-size", "big"], 2, "1024x768"),
    ],
)
def test_an_error_is_one_line_with_the_remedy(
    folder: Path, words: list[str], code: int, says: str
) -> None:
    whole = (folder / "picture.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    words = [word.replace("FOLDER", str(folder)) for word in words]
    if words[0] == "generate" and "-m" not in words:
        words += ["-m", str(folder)]
    done = opsin(*words)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


BROKEN = {
    "unknown family": ("config.json", '{"model_type": "novel_vl"}', "not supported"),
    "no model_type": ("config.json", "{}", "model_type"),
    "broken config": ("config.json", '{"model_type": ', "not valid JSON"),
    "no weights": ("model.safetensors", None, "no .safetensors file"),
    "cut weights": ("model.safetensors", b"\x10", "only 1 bytes"),
    "lying header": ("model.safetensors", b"\xff" * 64, "claims"),
    "adapters apart": ("vision-lora/adapter_config.json", "{}", "vision-lora"),
    "no tokenizer": ("tokenizer.json", None, "tokenizer"),
    "missing shard": (
        "model.safetensors.index.json",
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
        "model-00001-of-00002.safetensors",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_one_line_too(folder: Path, tmp_path: Path, fault: str) -> None:
    name, content, says = BROKEN[fault]
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / name).parent.mkdir(exist_ok=True)
    (broken / name).unlink(missing_ok=True)
    if isinstance(content, bytes):
        (broken / name).write_bytes(content)
    elif content is not None:
        (broken / name).write_text(content)
    done = opsin("generate", "-m", broken, "x")
    assert done.returncode in (3, 4), done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_config_that_lies_about_a_shape_names_the_tensor(folder: Path, tmp_path: Path) -> None:
    liar = tmp_path / "liar"
    shutil.copytree(folder, liar)
    config = json.loads((liar / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (liar / "config.json").write_text(json.dumps(config))
    done = opsin("generate", "-m", liar, "x")
    assert done.returncode == 4
    assert "gate_proj" in done.stderr or "down_proj" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_models_lists_families_and_inspects_a_checkpoint(folder: Path) -> None:
    listed = json.loads(opsin("models", "--json").stdout)
    assert any(row["model_type"] == "qwen3_vl" for row in listed["families"])
    words = ("models", "inspect", folder, "--image-size", "320x200", "--json")
    facts = json.loads(opsin(*words).stdout)
    assert facts["model_type"] == "qwen3_vl"
    assert facts["image_tokens"]["320x200"] > 0
    memory = facts["memory_bytes"]
    assert memory["weights"] == facts["parameters"] * 4
    smaller = memory["cache_at_kv_bits"]
    assert memory["cache"] > smaller["8"] > smaller["4"] > 0


def test_the_last_word_is_the_prompt_and_those_before_it_pictures(tmp_path: Path) -> None:
    assert split_words(["a.png", "b.png", "What?"], ["c.png"], None) == (
        ["c.png", "a.png", "b.png"],
        "What?",
    )
    assert split_words(["a.png"], [], "What?") == (["a.png"], "What?")
    lone = tmp_path / "a.png"
    lone.touch()
    with pytest.raises(InputError, match="is a file"):
        split_words([str(lone)], [], None)


def test_the_cache_is_quantised_and_windowed_by_flags(folder: Path) -> None:
    words = ("generate", "--model", folder, "What?", "--max-tokens", "2", "--format", "json")
    done = opsin(*words, "--kv-bits", "8", "--quantized-kv-start", "0", "--max-kv-size", "64")
    assert json.loads(done.stdout)["usage"]["generation_tokens"] == 2
    assert "of more than 64 tokens only the first 4 and the last 60 are seen" in done.stderr
    for flags, text in (
        (("--kv-bits", "3"), "kv_bits cannot be 3"),
        (("--kv-bits", "4", "--kv-group-size", "7"), "kv_group_size cannot be 7"),
        (("--max-kv-size", "3"), "max_kv_size cannot be 3"),
    ):
        refused = opsin(*words, *flags)
        assert refused.returncode == 2
        assert text in refused.stderr
