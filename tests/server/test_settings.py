"""Settings from flags, environment and file: one table, one order."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsin.errors import InputError
from opsin.server.settings import ServeSettings, read_file, read_settings


def test_flags_come_before_the_environment_before_the_file() -> None:
    file = {"port": 1, "host": "file", "max-queue": 5}
    environment = {"OPSIN_PORT": "2", "OPSIN_HOST": "env"}
    settings = read_settings({"port": "3", "host": None, "media_root": []}, environment, file)
    assert (settings.port, settings.host, settings.max_queue) == (3, "env", 5)
    assert settings.media_root == ()


def test_every_kind_of_value() -> None:
    environment = {
        "OPSIN_MEMORY": "1.5GB",
        "OPSIN_MAX_MEDIA_BYTES": "2MiB",
        "OPSIN_CORS_ORIGIN": "http://a, http://b",
        "OPSIN_ALLOW_PRIVATE_MEDIA": "yes",
        "OPSIN_TIMEOUT": "2.5",
        "OPSIN_MODEL": " org/name ",
    }
    settings = read_settings({}, environment, {})
    assert settings.memory == 1_500_000_000
    assert settings.max_media_bytes == 2 << 20
    assert settings.cors_origin == ("http://a", "http://b")
    assert settings.allow_private_media is True
    assert (settings.timeout, settings.model) == (2.5, "org/name")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("port", "x"),
        ("max_queue", "0"),
        ("memory", "much"),
        ("timeout", "nan"),
        ("allow_private_media", "perhaps"),
        ("log_level", "loud"),
        ("load_on_demand", "sometimes"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    variable = f"OPSIN_{name.upper()}"
    with pytest.raises(InputError) as caught:
        read_settings({}, {variable: value}, {})
    assert variable in caught.value.line()


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("prot: 8080\n")
    with pytest.raises(InputError, match="prot"):
        read_settings({}, {}, read_file(file))


@pytest.mark.parametrize("text", ["- a\n", "a: [", "7"])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(InputError):
        read_file(file)


def test_keys_may_stand_in_a_file_and_none_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert ServeSettings(api_key=("zero", f"@{file}")).keys() == ("zero", "one", "two")
    file.write_text("\n")
    for given in (("",), (" ",), (f"@{file}",), (f"@{tmp_path / 'nothing'}",)):
        with pytest.raises(InputError):
            ServeSettings(api_key=given).keys()


def test_without_a_media_root_no_local_file_may_be_named() -> None:
    assert ServeSettings().media_limits().media_root == ()
