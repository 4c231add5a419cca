"""The load tool against the real server."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from opsin.cli import app
from opsin.cli.bench_serve import percentile
from opsin.errors import EngineError

from .running import Running


def bench(*flags: str) -> dict:
    result = CliRunner().invoke(app, ["bench", "serve", *flags], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (line,) = result.output.strip().splitlines()
    return json.loads(line)


def test_a_load_of_text_and_pictures(server: Running) -> None:
    flags = ["--requests", "12", "--concurrency", "4", "--max-tokens", "8", "--ignore-eos"]
    flags += ["--image-share", "0.5", "--image-size", "64x48", "--prompt-words", "5"]
    found = bench("--base-url", f"{server.url}/v1", *flags)
    assert (found["requests"], found["errors"]) == (12, {})
    assert 0 < found["with_image"] < 12
    assert found["generated_tokens"] == 96
    for figures in (found["time_to_first_token_ms"]["image"], found["inter_token_ms"]):
        assert 0 < figures["p50"] <= figures["p99"]
    assert found["tokens_per_second"] > 0


def test_errors_are_counted_by_kind(server: Running) -> None:
    flags = ["--requests", "3", "--concurrency", "2", "--warm-up", "0", "--model", "no/such"]
    found = bench("--base-url", f"{server.url}/v1", *flags)
    assert found["errors"] == {"404": 3}
    assert found["inter_token_ms"] == {"p50": None, "p99": None}


def test_a_server_that_is_not_there_is_said_so() -> None:
    with pytest.raises(EngineError, match="does not answer"):
        bench("--base-url", "http://127.0.0.1:1/v1")


def test_percentiles() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (50.0, 99.0)
    assert percentile([], 0.5) is None
