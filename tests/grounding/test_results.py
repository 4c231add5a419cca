"""Regions of answers through the Python API and the command line, and tasks by name."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import opsin
from opsin import api
from opsin.__main__ import main
from opsin.errors import InputError
from opsin.families.base import Family
from opsin.families.qwen3_vl import Qwen3VL
from opsin.grounding import Box, extract_points_from_text
from opsin.prompt.tasks import task_messages
from opsin.types import Event, Grounding, Message, SamplingParams, Task, Text, Timings, Usage
from tests.families.checkpoints import write_checkpoint
from tests.families.pictures import picture
from tests.families.zoo.qwen import CASES

ANSWER = 'Here: [{"bbox_2d": [250, 500, 500, 1000], "label": "cat"}]'
CAT = Box(20, 30, 40, 60, label="cat", image_size=(80, 60))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = next(case for case in CASES if case.family == "qwen3_vl")
    folder = write_checkpoint(case, tmp_path_factory.mktemp("grounding"))
    picture(1, 80, 60).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[Any, Any]:
    return opsin.load(str(folder), device="cpu")


class Scripted:
    """An engine whose answer is known: two tokens an event, with the special tokens around."""

    def __init__(self, processor: Any, answer: str) -> None:
        self.processor = processor
        self.answer = answer
        self.prompts: list[str] = []

    def stream(self, prompt: Any, sampling: SamplingParams, **options: Any) -> Iterator[Event]:
        self.prompts.append(prompt.text)
        ids = self.processor.tokenizer.encode(self.answer + "<|im_end|>", add_special_tokens=False)
        for i in range(0, len(ids), 2):
            piece = ids[i : i + 2]
            yield Event(self.processor.tokenizer.decode(piece), piece)
        usage = Usage(len(prompt.token_ids), len(ids))
        yield Event("", (), (), "stop", usage, Timings())


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The API with that engine; the answer can be changed."""
    engine = Scripted(None, ANSWER)

    def engine_for(model: Any, processor: Any, limits: Any) -> Scripted:
        engine.processor = processor
        return engine

    monkeypatch.setattr(api, "engine_for", engine_for)
    return engine


def test_a_result_has_the_regions_of_the_whole_answer(loaded: Any, scripted: Scripted) -> None:
    result = opsin.generate(*loaded, "Where is the cat?", picture(1, 80, 60))
    assert result.text == ANSWER
    assert result.regions == (CAT,)
    assert [image.size for image in result.pictures] == [(80, 60)]
    assert str(result) == ANSWER
    assert "pictures" not in repr(result)


def test_a_resized_picture_s_regions_are_those_of_the_original(
    loaded: Any, scripted: Scripted
) -> None:
    result = opsin.generate(*loaded, "Where?", picture(1, 80, 60), resize_shape=(64, 64))
    assert result.regions == (CAT,)


def test_streaming_gives_them_with_the_last_result(loaded: Any, scripted: Scripted) -> None:
    results = list(opsin.stream_generate(*loaded, "Where?", picture(1, 80, 60)))
    assert [bool(result.regions) for result in results] == [False] * (len(results) - 1) + [True]


def test_a_batch_has_regions_and_keeps_no_pictures(loaded: Any, scripted: Scripted) -> None:
    images = [picture(1, 80, 60), None]
    first, second = opsin.batch_generate(*loaded, images, ["Where?", "Where?"])
    assert first.regions == (CAT,)
    assert first.pictures == second.regions == ()


def test_a_notebook_shows_the_picture_only_if_there_are_regions(
    loaded: Any, scripted: Scripted
) -> None:
    result = opsin.generate(*loaded, "Where?", picture(1, 80, 60))
    data = result._repr_png_()
    assert data is not None
    assert Image.open(io.BytesIO(data)).size == result.annotated()[0].size
    scripted.answer = "No cat."
    nothing = opsin.generate(*loaded, "Where?", picture(1, 80, 60))
    assert (nothing.regions, nothing.pictures, nothing._repr_png_()) == ((), (), None)


def opsin_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["opsin", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    code = ended.value.code
    return int(code) if code is not None else 0, out, err


def test_annotate_draws_and_json_lists_the_regions(
    folder: Path, tmp_path: Path, scripted: Scripted, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out.png"
    words = ("generate", "-m", folder, "--image", folder / "picture.png", "Where?")
    code, said, _ = opsin_command(
        monkeypatch, capsys, *words, "--annotate", out, "--format", "json"
    )
    assert code == 0
    assert json.loads(said)["regions"] == [
        {"type": "box", "box": [20, 30, 40, 60], "image_index": 0, "label": "cat"}
    ]
    assert Image.open(out).size == (320, 240)


def test_annotate_without_regions_still_prints_the_answer(
    folder: Path, tmp_path: Path, scripted: Scripted, monkeypatch: Any, capsys: Any
) -> None:
    scripted.answer = "There is no cat."
    out = tmp_path / "out.png"
    words = ("generate", "-m", folder, folder / "picture.png", "Where?", "--annotate", out)
    code, said, error = opsin_command(monkeypatch, capsys, *words)
    assert (code, said) == (2, "There is no cat.\n")
    assert "was not written" in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_annotate_numbers_the_files_of_several_pictures(
    folder: Path, tmp_path: Path, scripted: Scripted, monkeypatch: Any, capsys: Any
) -> None:
    boxes = [{"bbox_2d": [0, 0, 500, 500], "image_index": i} for i in range(2)]
    scripted.answer = json.dumps(boxes)
    image = folder / "picture.png"
    words = ("generate", "-m", folder, image, image, "Where?", "--annotate", tmp_path / "out.png")
    assert opsin_command(monkeypatch, capsys, *words)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-2.png", "out.png"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["Where?", "--annotate", "out.png"], "no picture"),
        (["--image", "x.png", "Where?", "--annotate", "missing/out.png"], "no folder"),
        (["--image", "x.png", "Where?", "--annotate", "out.txt"], "no kind of picture"),
    ],
)
def test_annotate_refuses_before_it_loads_anything(
    words: list[str], says: str, monkeypatch: Any, capsys: Any
) -> None:
    words = ["generate", "-m", "/no/such/model", *words]
    code, said, error = opsin_command(monkeypatch, capsys, *words)
    assert (code, said) == (2, "")
    assert says in error


def test_a_task_writes_the_prompt(
    folder: Path, scripted: Scripted, monkeypatch: Any, capsys: Any
) -> None:
    words = ("generate", "-m", folder, "--image", folder / "picture.png", "--task")
    assert opsin_command(monkeypatch, capsys, *words, "locate", "the cat")[0] == 0
    assert opsin_command(monkeypatch, capsys, *words, "ocr")[0] == 0
    image = ("generate", "-m", folder, "--task", "ocr", "--system", "Be brief.")
    assert opsin_command(monkeypatch, capsys, *image, folder / "picture.png")[0] == 0
    locate, ocr, brief = scripted.prompts
    assert 'matches the description "the cat" in the image. Report bbox' in locate
    assert Qwen3VL.tasks["ocr"].prompt in ocr
    assert "<|image_pad|>" in brief
    assert "Be brief." in brief


@pytest.mark.parametrize(
    ("task", "prompt", "says"),
    [
        ("lcoate", "cat", "Did you mean locate"),
        ("locate", " ", "needs words"),
        ("ocr", "cat", "takes no words"),
    ],
)
def test_a_wrong_task_is_refused_with_the_remedy(
    loaded: Any, task: str, prompt: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        opsin.generate(*loaded, prompt, picture(1, 80, 60), task=task)


def test_a_task_s_words_are_not_a_template() -> None:
    (message,) = task_messages(Qwen3VL({}, {}), "locate", "{text} {0} \\1")
    assert 'description "{text} {0} \\1" in the image' in message.text


def test_a_task_takes_the_last_message_s_words_and_leaves_its_pictures() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, "cat"]},
    ]
    messages[1]["content"][1] = {"type": "text", "text": "cat"}  # type: ignore[index]
    system, user = task_messages(Qwen3VL({}, {}), "locate", messages)
    assert system == Message("system", (Text("Be brief."),))
    assert len(user.media) == 1
    assert '"cat"' in user.text


def test_a_page_s_task_gives_a_layout(
    loaded: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Task("Read the page.", grounding=(Grounding("json_layout", 1000),), layout=True)
    monkeypatch.setattr(Qwen3VL, "tasks", {"layout": page})
    scripted.answer = '[{"bbox": [0, 0, 500, 500], "category": "Title", "text": "Hello"}]'
    result = opsin.generate(*loaded, "", picture(1, 80, 60), task="layout")
    assert result.layout is not None
    assert result.layout.to_markdown() == "# Hello\n"
    assert result.layout.elements[0].bbox == Box(0, 0, 40, 30, image_size=(80, 60))
    assert opsin.generate(*loaded, "Hi", picture(1, 80, 60)).layout is None


def test_prepare_inputs_leaves_the_pointing_metadata(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = loaded
    opsin.prepare_inputs(processor, picture(1, 80, 60), prompts="Point.")
    assert processor.pointing_metadata is None
    prepare = Qwen3VL.prepare_image
    pointing = {
        "token_pooling": [[0]],
        "subpatch_mapping": [[[0]]],
        "image_sizes": [(80, 60)],
    }

    def with_metadata(self: Any, *args: Any) -> Any:
        ready = prepare(self, *args)
        ready.details["pointing"] = pointing
        return ready

    monkeypatch.setattr(Qwen3VL, "prepare_image", with_metadata)
    opsin.prepare_inputs(processor, [picture(1, 80, 60)] * 2, prompts="Point.")
    metadata = processor.pointing_metadata
    assert metadata["token_pooling"].tolist() == [[0], [1]]
    assert extract_points_from_text("<POINT_1> <POINT_3> <POINT_8> 1", metadata)[0][:2] == (1, 1)


def test_models_tasks_lists_them(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    for name in (folder, "qwen3_vl"):
        code, said, _ = opsin_command(monkeypatch, capsys, "models", "tasks", name, "--json")
        assert code == 0
        assert {row["task"] for row in json.loads(said)} == set(Qwen3VL.tasks)
    said = opsin_command(monkeypatch, capsys, "models", "tasks", folder)[1]
    assert 'description "{text}" in the image' in said


def test_a_blocker_reaches_the_engine(loaded: Any) -> None:
    """Greedy and unblocked, the tiny model repeats itself; blocked, no pair comes twice."""
    asked = {"max_tokens": 40, "ignore_eos": True}
    free = opsin.generate(*loaded, "What?", **asked).tokens
    blocked = opsin.generate(*loaded, "What?", **asked, no_repeat_ngram_size=2).tokens
    assert has_repeated_pair(free)
    assert not has_repeated_pair(blocked)
    with pytest.raises(InputError, match="no_repeat_ngram_size"):
        opsin.generate(*loaded, "What?", no_repeat_ngram_size=-1)


def has_repeated_pair(tokens: Sequence[int]) -> bool:
    pairs = list(itertools.pairwise(tokens))
    return len(set(pairs)) < len(pairs)


def test_every_family_states_syntaxes_that_exist() -> None:
    from opsin import families
    from opsin.families.index import MODULES
    from opsin.grounding.syntax import PATCH_POINTS, SYNTAXES

    known = {*SYNTAXES, PATCH_POINTS}
    for model_type in MODULES:
        family: type[Family] = families.find(model_type)
        stated: Any = SimpleNamespace(tasks=family.tasks, grounding=family.grounding)
        ways = [*stated.grounding, *(way for t in stated.tasks.values() for way in t.grounding)]
        assert {way.syntax for way in ways} <= known, model_type
