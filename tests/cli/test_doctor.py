import json
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from opsin.checkpoint import hub
from opsin.cli import doctor
from opsin.cli.doctor import Check
from opsin.kernels import cpu


@pytest.fixture(scope="module")
def checks() -> dict[str, Check]:
    return {check.name: check for check in doctor.report()}


def test_everything_asked_for_is_looked_at(checks: dict[str, Check]) -> None:
    assert list(checks) == [
        "python",
        "torch",
        "processor",
        "memory",
        "native kernels",
        "memory bandwidth",
        "gpu",
        "ffmpeg libraries",
        "bundled model",
        "hub cache",
        "extra: transformers",
        "extra: ui",
        "extra: ray",
    ]
    assert all(check.detail for check in checks.values())


def test_what_is_missing_has_a_remedy_and_what_is_there_has_none(checks: dict[str, Check]) -> None:
    assert all(bool(check.remedy) != check.ok for check in checks.values())
    assert all(
        check.ok for check in checks.values() if check.required and check.name != "bundled model"
    )


def test_the_bandwidth_is_plausible_and_quick() -> None:
    start = time.perf_counter()
    for measured in (doctor.read_bandwidth(), doctor._read_bandwidth_without_kernels(2)):
        assert 0.2e9 < measured < 5e12
    assert time.perf_counter() - start < 10


def test_without_native_kernels_the_reason_and_the_remedy_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "load", lambda: None)
    monkeypatch.setattr(cpu, "why_missing", lambda: "it was not built")
    check = doctor._native_kernels()
    assert (check.ok, check.detail) == (False, "it was not built")
    assert "compiler" in check.remedy
    assert doctor.read_bandwidth() > 0


def test_an_extra_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "ray", ("no_such_module", "several machines"))
    check = doctor._extra("ray")
    assert check == Check(
        "extra: ray", False, "not installed: several machines", "pip install 'opsin[ray]'"
    )


def test_a_broken_part_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(hub, "BUNDLED_FOLDER", tmp_path)
    check = doctor._guarded(doctor._bundled_model)
    assert (check.name, check.ok, check.required) == ("bundled model", False, True)
    assert check.detail == "this installation lacks its files"
    assert "Reinstall" in check.remedy
    monkeypatch.setitem(sys.modules, "av", None)
    assert not doctor._guarded(doctor._ffmpeg_libraries).ok


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(doctor.command)
    return app


def test_text_and_json_tell_the_same(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check("one", True, "here"), Check("two", False, "gone", "get it")]
    monkeypatch.setattr(doctor, "report", lambda: found)
    text = CliRunner().invoke(app, [])
    assert text.exit_code == 0
    assert text.output.split() == ["ok", "one", "here", "-", "two", "gone", "get", "it"]
    rows = json.loads(CliRunner().invoke(app, ["--json"]).output)
    assert [Check(**row) for row in rows] == found


def test_only_a_missing_requirement_fails(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "report", lambda: [Check("a", False, "gone", "get it", required=True)]
    )
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "missing a" in " ".join(result.output.split())


def test_the_module_loads_without_torch() -> None:
    code = "import opsin.cli.doctor, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
