"""A model that runs through Transformers is served like any other."""

from __future__ import annotations

from pathlib import Path

from ..engine.test_fallback import vipllava
from ..families.checkpoints import write_checkpoint
from .running import serving


def test_a_model_without_a_family_answers_a_chat(tmp_path: Path, data_url: str) -> None:
    folder = write_checkpoint(vipllava(), tmp_path / "slow")
    body = {
        "model": "default",
        "max_tokens": 6,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url}},
                    {"type": "text", "text": "Describe the picture."},
                ],
            }
        ],
    }
    with serving(folder) as running:
        client = running.ready().client
        first, second = (client.post("/v1/chat/completions", json=body) for _ in range(2))
        listed = client.get("/v1/models").json()["data"]
        health = client.get("/health")
    assert first.status_code == 200, first.text
    choices = [reply.json()["choices"][0]["message"]["content"] for reply in (first, second)]
    assert choices[0] == choices[1]
    assert first.json()["usage"]["prompt_tokens"] > 9
    assert any("image" in model.get("modalities", ()) for model in listed)
    assert health.status_code == 200
