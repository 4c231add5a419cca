"""The words of a sound, asked for with the bundled template of a checkpoint that has none."""

from __future__ import annotations

from collections.abc import Callable

from .checkpoints import Case
from .conftest import Lab
from .pictures import sound
from .zoo import voxtral

CLIP = "[AUDIO]" * 375


def test_transcription_is_asked_for_in_the_model_s_tokens(labs: Callable[[Case], Lab]) -> None:
    processor = labs(voxtral.CASES[0]).ours.processor
    messages = [{"role": "user", "content": []}]
    asked = {"audios": [sound(3, 0.5)], "chat_template_kwargs": {"transcribe": True}}
    prompt = processor.prepare(messages, **asked)
    assert prompt.text == f"<s>[INST][BEGIN_AUDIO]{CLIP}[/INST][TRANSCRIBE]"
    asked["chat_template_kwargs"] = {"transcribe": True, "language": "en"}
    prompt = processor.prepare(messages, **asked)
    assert prompt.text == f"<s>[INST][BEGIN_AUDIO]{CLIP}[/INST]lang:en[TRANSCRIBE]"
    ids = [voxtral.CONTROL.index(name) for name in ("<s>", "[INST]", "[BEGIN_AUDIO]", "[AUDIO]")]
    assert prompt.token_ids[:4] == ids
    assert prompt.token_ids[-1] == voxtral.CONTROL.index("[TRANSCRIBE]")
