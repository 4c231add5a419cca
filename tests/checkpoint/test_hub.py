import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from opsin.checkpoint import hub
from opsin.errors import CheckpointError, NotFoundError

COMMIT = "a" * 40
TENSORS = b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "


class FakeHub:
    """A hub on the loopback: repositories as dicts of file to bytes, and what was asked of it."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.status: int | None = None
        self.requests: list[str] = []
        self.revisions = {"main", COMMIT, "v1"}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        path = unquote(urlsplit(path).path)
        self.requests.append(path)
        if self.status is not None:
            return self.status, {}, b"{}"
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if name not in self.repos:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if len(rest) > 1 and rest[1] not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.repos[name]
        if api:
            return 200, {"Content-Type": "application/json"}, self.listing(rest, name, files)
        file = "/".join(rest[2:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        return 200, {"ETag": f'"{file}"', "X-Repo-Commit": COMMIT}, files[file]

    def listing(self, rest: list[str], name: str, files: dict[str, bytes]) -> bytes:
        """What the hub's API says of a repository."""
        if rest and rest[0] == "tree":
            rows = [
                {"type": "file", "path": f, "size": len(b), "oid": "b" * 40}
                for f, b in files.items()
            ]
            return json.dumps(rows).encode()
        siblings = [{"rfilename": f} for f in files]
        return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()

    def downloaded(self) -> set[str]:
        """The names of the files that were fetched."""
        return {
            p.split("/resolve/")[1].partition("/")[2] for p in self.requests if "/resolve/" in p
        }


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        status, headers, body = self.hub.answer(self.path)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name http.server calls

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return folder


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": fake}))
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


def fill(fake: FakeHub, name: str = "org/model", **more: bytes) -> None:
    fake.repos[name] = {
        "config.json": b'{"model_type": "thing"}',
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": TENSORS,
        "pytorch_model.bin": b"pickle",
        "modeling_thing.py": b"import os",
        "README.md": b"hello",
        "onnx/model.onnx": b"x",
        **more,
    }


def test_a_hub_name_becomes_a_folder_with_the_files_a_loader_reads(fake: FakeHub) -> None:
    fill(fake)
    folder = hub.resolve("org/model")
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert fake.downloaded() == names
    assert (folder / "model.safetensors").read_bytes() == TENSORS


def test_the_cache_is_the_hubs_own_and_answers_offline(
    fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(fake)
    folder = hub.resolve("org/model")
    assert folder == cache / "models--org--model" / "snapshots" / COMMIT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake.requests.clear()
    assert hub.resolve("org/model") == folder
    assert fake.requests == []
    with pytest.raises(NotFoundError, match="Unset HF_HUB_OFFLINE") as caught:
        hub.resolve("org/other")
    assert "\n" not in str(caught.value)


def test_a_revision_is_pinned(fake: FakeHub) -> None:
    fill(fake)
    hub.resolve("org/model", revision="v1")
    assert any("/revision/v1" in path for path in fake.requests)
    with pytest.raises(NotFoundError, match="no such revision") as caught:
        hub.resolve("org/model", revision="v2")
    assert caught.value.param == "revision"


@pytest.mark.parametrize("revision", ["../main", "a/../b", "", "-x", "a b"])
def test_a_revision_that_cannot_be_one_is_refused(fake: FakeHub, revision: str) -> None:
    with pytest.raises(NotFoundError, match="cannot be a branch"):
        hub.resolve("org/model", revision=revision)
    assert fake.requests == []


def test_each_refusal_of_the_hub_has_its_remedy(fake: FakeHub) -> None:
    fake.gated.add("org/gated")
    for name, remedy in (("org/gated", "set HF_TOKEN"), ("org/missing", "Check the spelling")):
        with pytest.raises(NotFoundError, match=remedy) as caught:
            hub.resolve(name)
        assert "\n" not in str(caught.value)
        assert "http" not in str(caught.value)
    fake.status = 400
    with pytest.raises(NotFoundError, match="the hub answered 400"):
        hub.resolve("org/model")


def test_no_network_is_one_line_and_the_cache_still_answers(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(fake)
    folder = hub.resolve("org/model")

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with caplog.at_level(logging.WARNING, "opsin.checkpoint.hub"):
        assert hub.resolve("org/model") == folder
    assert "using the cached copy" in caplog.text
    with pytest.raises(NotFoundError, match=r"the hub cannot be reached.*Check the connection"):
        hub.resolve("org/other")


def test_a_full_disk_is_said_to_be_full(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(fake)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"no space is left.*HF_HOME"):
        hub.resolve("org/model")


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt"])
def test_row_18_a_repository_of_pickled_weights_is_refused(fake: FakeHub, ending: str) -> None:
    fake.repos["org/model"] = {"config.json": b"{}", f"weights{ending}": b"pickle"}
    with pytest.raises(CheckpointError, match=r"pickled.*Use a repository.*safetensors"):
        hub.resolve("org/model")
    assert fake.downloaded() == set()


def test_row_18_a_folder_is_itself_unless_its_weights_are_pickled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert hub.resolve(tmp_path) == tmp_path
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        hub.resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(TENSORS)
    assert hub.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="it is a file"):
        hub.resolve(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "org/../../etc",
        "/nowhere/at/all",
        "~nobody/model",
        "org/model/more",
        "org//model",
        "org\\model",
        "a..b/c",
        "org/mo--del",
        "",
        ".",
        "-flag/model",
        "org/model\n",
        "x" * 200,
    ],
)
def test_what_is_no_name_never_reaches_the_hub(fake: FakeHub, name: str) -> None:
    with pytest.raises(NotFoundError):
        hub.resolve(name, local=False)
    assert fake.requests == []


def test_a_name_from_a_client_is_never_a_path(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model") == Path("org/model")
    with pytest.raises(NotFoundError, match="no such model"):
        hub.resolve("org/model", local=False)


def test_the_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BUNDLED_FOLDER", tmp_path)
    with pytest.raises(NotFoundError, match="Reinstall"):
        hub.resolve("bundled")
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve("bundled", local=False) == tmp_path


def test_the_same_weights_are_taken_once() -> None:
    texts = ["config.json", "tekken.json", "vocab.txt"]
    shards = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    twice = [*texts, *shards, index, "consolidated.safetensors", "model.gguf"]
    assert hub.wanted_files(twice) == sorted([*texts, *shards, index])
    assert hub.wanted_files([*texts, "consolidated.safetensors"]) == sorted(
        [*texts, "consolidated.safetensors"]
    )


def test_adapters_and_templates_in_folders_come_along() -> None:
    kept = [
        "additional_chat_templates/tools.jinja",
        "model.safetensors",
        "speech-lora/adapter_config.json",
        "speech-lora/adapter_model.safetensors",
    ]
    assert hub.wanted_files([*kept, "onnx/config.json", "original/tokenizer.model"]) == kept


def test_a_gguf_is_chosen_by_its_variant() -> None:
    files = [
        "m-Q4_K_M.gguf",
        "m-Q8_0-00001-of-00002.gguf",
        "m-Q8_0-00002-of-00002.gguf",
        "mmproj.gguf",
    ]
    assert hub.wanted_files(files, "q4_k_m") == ["m-Q4_K_M.gguf", "mmproj.gguf"]
    assert hub.wanted_files(files, "Q8_0") == files[1:]
    assert hub.wanted_files(["m.gguf"]) == ["m.gguf"]
    with pytest.raises(CheckpointError, match=r"m-Q4_K_M, m-Q8_0.*after a colon"):
        hub.wanted_files(files)
    with pytest.raises(CheckpointError, match="No GGUF file is Q2"):
        hub.wanted_files(files, "Q2")


def test_cached_models_are_those_with_weights(fake: FakeHub, cache: Path) -> None:
    assert hub.cached_models() == []
    fill(fake)
    fill(fake, "org/another", **{"config.json": b"not json"})
    hub.resolve("org/model")
    hub.resolve("org/another")
    fake.repos["org/empty"] = {"config.json": b"{}"}
    hub.resolve("org/empty")
    another, model = hub.cached_models()
    assert (another.name, another.model_type) == ("org/another", "")
    assert (model.name, model.model_type, model.revision) == ("org/model", "thing", COMMIT)
    assert model.path == cache / "models--org--model" / "snapshots" / COMMIT
    assert model.size == sum(p.stat().st_size for p in model.path.iterdir())


def test_importing_the_module_does_not_load_the_hubs_library() -> None:
    code = "import opsin.checkpoint.hub, sys; print('huggingface_hub' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.strip() == "False"


def test_progress_bars_are_for_terminals(fake: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    fill(fake)
    hub.resolve("org/model")
    assert capfd.readouterr().err == ""
