"""A server that guesses what comes next says the same, and counts its guesses."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsin.engine.speculation import MOST, Costs, Drafter
from opsin.errors import InputError
from opsin.server.manager import engine_limits
from opsin.server.settings import ServeSettings, read_settings

from .running import Running, serving

ASKED = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.05, "seed": 3}


def test_it_is_off_unless_asked_for() -> None:
    assert engine_limits(ServeSettings()).speculative is None
    for settings in (
        read_settings({"speculative": "ngram"}, {}, {}),
        read_settings({}, {"OPSIN_SPECULATIVE": "ngram"}, {}),
        read_settings({}, {}, {"speculative": "ngram"}),
    ):
        assert engine_limits(settings).speculative == "ngram"
    with pytest.raises(InputError, match="it is one of ngram"):
        read_settings({"speculative": "magic"}, {}, {})


def test_answers_are_the_same_and_guesses_are_counted(
    server: Running, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Costs, "most", lambda *_: MOST)
    monkeypatch.setattr(
        Drafter, "worth", lambda self, costs, requests, others, most: min(most, len(self.guesses))
    )
    question = "one two three " * 8
    plain = server.chat(question, **ASKED).json()
    with serving(checkpoint, speculative="ngram") as running:
        guessed = running.ready().chat(question, **ASKED).json()
        page = running.client.get("/metrics").text
        streamed = running.chat(
            question, stream=True, stream_options={"include_usage": True}, **ASKED
        ).text
    assert guessed["choices"] == plain["choices"]
    assert "accepted_prediction_tokens" not in plain["usage"]["completion_tokens_details"]
    counts = guessed["usage"]["completion_tokens_details"]
    accepted, wrong = counts["accepted_prediction_tokens"], counts["rejected_prediction_tokens"]
    assert accepted + wrong > 0
    assert f"opsin_drafted_tokens_total {float(accepted + wrong)}\n" in page
    assert f"opsin_accepted_tokens_total {float(accepted)}\n" in page
    assert f'"accepted_prediction_tokens":{accepted}' in streamed.replace(" ", "")
