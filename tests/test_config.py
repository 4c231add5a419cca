from pathlib import Path

import pytest

from opsin.config import Settings, keeps_unasked, repacked_folder, settings
from opsin.errors import InputError


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.read({}) == Settings(cache=Path.home() / ".cache" / "opsin")


def test_every_variable_is_read() -> None:
    environ = {
        "OPSIN_CACHE": "somewhere",
        "OPSIN_CPU_ISA": "AVX2",
        "OPSIN_NUM_THREADS": "3",
        "OPSIN_LOG_LEVEL": "Debug",
        "OPSIN_REPACKED_CACHE": "/kept/Here",
    }
    expected = Settings(Path("somewhere"), "avx2", 3, "debug", "/kept/Here")
    assert Settings.read(environ) == expected
    assert Settings.read({"XDG_CACHE_HOME": "base"}).cache == Path("base/opsin")


@pytest.mark.parametrize(
    ("name", "value"),
    [("OPSIN_NUM_THREADS", v) for v in ("0", "-1", "two", "1.5")] + [("OPSIN_LOG_LEVEL", "loud")],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{name}={value}.*Set {name} to") as caught:
        Settings.read({name: value})
    assert caught.value.param == name


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.cache_clear()
    monkeypatch.setenv("OPSIN_NUM_THREADS", "2")
    first = settings()
    monkeypatch.setenv("OPSIN_NUM_THREADS", "4")
    assert settings() is first
    assert first.num_threads == 2
    settings.cache_clear()


def test_where_packed_weights_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path))
    monkeypatch.setenv("OPSIN_REPACKED_CACHE", "on")
    settings.cache_clear()
    assert repacked_folder() == repacked_folder("on") == tmp_path / "repacked"
    assert repacked_folder("off") is None
    assert repacked_folder("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("OPSIN_REPACKED_CACHE")
    settings.cache_clear()
    assert repacked_folder() == tmp_path / "repacked"
    assert keeps_unasked()
    assert not keeps_unasked("on")
    settings.cache_clear()
