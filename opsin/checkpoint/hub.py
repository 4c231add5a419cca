"""Turns a model's name or path into a folder: a folder on disk, the bundled model, or the hub.

Hub downloads go through `huggingface_hub` and follow its conventions: its cache, its token, its
offline switch. Only configuration, tokenizer, template and safetensors or GGUF files are ever
downloaded: pickled weights (`.bin`, `.pt`) and code (`.py`) stay where they are.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from opsin.errors import CheckpointError, NotFoundError, OpsinError

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parents[1] / "models" / "bundled"

TEXT_ENDINGS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".ttf")
WEIGHT_ENDINGS = (".safetensors", ".gguf")
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(
    rf"(?P<repo>(?:{_SEGMENT}/)?{_SEGMENT})(?::(?P<variant>[A-Za-z0-9._-]{{1,64}}))?"
)
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the local hub cache: its name, folder, bytes on disk, `model_type`, commit."""

    name: str
    path: Path
    size: int
    model_type: str
    revision: str


def resolve(name_or_path: str | Path, revision: str | None = None, *, local: bool = True) -> Path:
    """The folder of a checkpoint.

    `name_or_path` is "bundled", an existing folder, or a hub name `org/model`, to which
    `:VARIANT` adds which of several GGUF files is meant (`org/model:Q4_K_M`). `revision` is a
    branch, tag or commit of the hub. With `local=False` a name is never taken for a path, which is
    what a server needs when the name comes from a client.

    Raises NotFoundError (no such folder or model, or it is not reachable) and CheckpointError (the
    weights there cannot be used).
    """
    text = str(name_or_path)
    if text == BUNDLED:
        return _bundled()
    if local:
        path = Path(text).expanduser()
        if path.is_dir():
            return _usable_folder(path)
        if path.is_file():
            raise CheckpointError(
                f"{text} is not a checkpoint",
                why="it is a file",
                remedy="Name the folder that holds it",
                param="model",
            )
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"]:
        raise NotFoundError(
            f"Model {text} was not found",
            why="no such folder exists, and it is not a hub name",
            remedy="Give a folder, a hub name such as org/model, or bundled",
            param="model",
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise NotFoundError(
            f"Revision {revision} was not found",
            why="that cannot be a branch, tag or commit",
            remedy="Give a branch, a tag or a commit hash",
            param="revision",
        )
    return _Hub(match["repo"], match["variant"], revision).folder()


def _bundled() -> Path:
    if not (BUNDLED_FOLDER / "config.json").is_file():
        raise NotFoundError(
            "The bundled model was not found",
            why="this installation lacks its files",
            remedy="Reinstall opsin, or name another model",
            param="model",
        )
    return BUNDLED_FOLDER


def _usable_folder(path: Path) -> Path:
    """The folder, unless its only weights are pickled."""
    files = [entry.name for entry in path.iterdir()]
    if not _ending(files, WEIGHT_ENDINGS) and (pickled := _ending(files, PICKLE_ENDINGS)):
        raise _pickled(str(path), pickled[0])
    return path


def _ending(files: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    """The files with one of the endings, sorted; `training_args.bin` holds no weights."""
    return sorted(
        f for f in files if f.lower().endswith(endings) and "training_args" not in f.lower()
    )


def _pickled(name: str, file: str) -> CheckpointError:
    return CheckpointError(
        f"{name} cannot be loaded",
        why=f"its weights are pickled ({file}), and unpickling runs whatever code they hold",
        remedy="Use a repository or revision that has safetensors, or convert the file with "
        "safetensors.torch.save_file on a machine you can spare",
        param="model",
    )


def wanted_files(files: Iterable[str], variant: str | None = None) -> list[str]:
    """Which files of a repository to download, of all it lists.

    Top-level configuration and weights, plus folders that hold an adapter or more templates. Where
    the same weights are there twice (`consolidated*.safetensors` beside `model*.safetensors`,
    GGUF beside safetensors), the first layout a loader wants is taken once. CheckpointError where
    several GGUF files are there and `variant` does not choose.
    """
    listed = sorted(files)
    adapters = {
        str(PurePosixPath(f).parent) for f in listed if f.endswith("/adapter_config.json")
    } | {"additional_chat_templates"}
    near = [f for f in listed if "/" not in f or str(PurePosixPath(f).parent) in adapters]
    texts = _ending(near, TEXT_ENDINGS)
    tensors = _ending(near, (".safetensors",))
    if any(f.startswith("model") for f in tensors):
        tensors = [f for f in tensors if not f.startswith("consolidated")]
    if tensors and variant is None:
        return sorted(texts + tensors)
    return sorted(texts + _chosen_gguf(_ending(near, (".gguf",)), variant))


def _chosen_gguf(files: list[str], variant: str | None) -> list[str]:
    """One GGUF model (all its shards) and one projector file."""
    projectors = [f for f in files if f.lower().startswith("mmproj")]
    models = [f for f in files if f not in projectors]
    names = sorted({re.sub(r"-\d{5}-of-\d{5}\.gguf$|\.gguf$", "", f) for f in models})
    chosen = names
    if variant is not None:
        chosen = [
            n for n in names if re.search(rf"(^|[.-]){re.escape(variant)}$", n, re.IGNORECASE)
        ]
    if len(chosen) > 1 or (variant is not None and not chosen):
        raise CheckpointError(
            "The GGUF file to load is not clear"
            if len(chosen) > 1
            else f"No GGUF file is {variant}",
            why="the repository has " + (", ".join(names) or "none"),
            remedy="Add the variant's name after a colon, such as org/model:Q4_K_M",
            param="model",
        )
    return [f for f in models if f.startswith(tuple(chosen))] + projectors[:1] if chosen else []


@dataclass(frozen=True, slots=True)
class _Hub:
    """One model of the hub, at one revision."""

    repo: str
    variant: str | None
    revision: str | None

    def folder(self) -> Path:
        """The snapshot's folder, downloaded as far as needed."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        if cache_folder()[1]:
            return self._cached() or self._raise_offline()
        try:
            info = HfApi().model_info(self.repo, revision=self.revision)
            listed = [sibling.rfilename for sibling in info.siblings or ()]
            wanted = wanted_files(listed, self.variant)
            if not _ending(wanted, WEIGHT_ENDINGS) and (pickled := _ending(listed, PICKLE_ENDINGS)):
                raise _pickled(self.repo, pickled[0])
            return self._download(wanted)
        except (HTTPError, OSError) as error:
            cached = None if _disk_is_full(error) else self._cached()
            if cached is None:
                raise self._explained(error) from error
            _log.warning("The hub did not answer for %s: using the cached copy.", self.repo)
            return cached

    def _download(self, files: list[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in files]
        return Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns))

    def _cached(self) -> Path | None:
        """The snapshot in the cache, None where it is not there."""
        from huggingface_hub import try_to_load_from_cache

        for marker in ("config.json", "params.json"):
            found = try_to_load_from_cache(self.repo, marker, revision=self.revision)
            if isinstance(found, str):
                return _usable_folder(Path(found).parent)
        return None

    def _raise_offline(self) -> Path:
        raise NotFoundError(
            f"Model {self._named()} was not found",
            why="it is not in the local cache, and HF_HUB_OFFLINE is set",
            remedy="Unset HF_HUB_OFFLINE to download it, or give a folder",
            param="model",
        )

    def _named(self) -> str:
        return f"{self.repo} at revision {self.revision}" if self.revision else self.repo

    def _explained(self, error: Exception) -> OpsinError:
        """The hub's error in one line, with the remedy."""
        from huggingface_hub.errors import (
            DisabledRepoError,
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        what = f"Model {self._named()} could not be fetched"
        gate = "Accept its terms on its hub page, then set HF_TOKEN to a token of that account"
        wait = "Check the connection and the name, or give a folder"
        match error:
            case GatedRepoError():
                return NotFoundError(
                    what, why="its access is restricted", remedy=gate, param="model"
                )
            case RepositoryNotFoundError():
                why = "the hub has no such model, or it is private"
                mend = "Check the spelling; for a private model set HF_TOKEN"
                return NotFoundError(what, why=why, remedy=mend, param="model")
            case RevisionNotFoundError():
                why = "the model has no such revision"
                mend = "Leave --revision out, or give a branch, tag or commit it has"
                return NotFoundError(what, why=why, remedy=mend, param="revision")
            case DisabledRepoError():
                why = "its author or the hub has disabled it"
                return NotFoundError(what, why=why, remedy="Choose another model", param="model")
            case HfHubHTTPError():
                status = error.response.status_code if error.response is not None else "an error"
                return NotFoundError(
                    what, why=f"the hub answered {status}", remedy=wait, param="model"
                )
            case OSError() if _disk_is_full(error):
                why = "no space is left in the cache"
                mend = "Free some, or point HF_HOME to another disk"
                return CheckpointError(what, why=why, remedy=mend, param="model")
        why = "the hub cannot be reached"
        return NotFoundError(what, why=why, remedy=wait, param="model")


def _disk_is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


def cache_folder() -> tuple[Path, bool]:
    """Where the hub's cache is, and whether HF_HUB_OFFLINE forbids to fill it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE), bool(constants.HF_HUB_OFFLINE)


def cached_models() -> list[CachedModel]:
    """The models in the local hub cache that hold weights Opsin can read, by name."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(cache_folder()[0]).repos
    except CacheNotFound:
        return []
    found = [
        CachedModel(
            name=repo.repo_id,
            path=revision.snapshot_path,
            size=revision.size_on_disk,
            model_type=_model_type(revision.snapshot_path),
            revision=revision.commit_hash,
        )
        for repo in repos
        if repo.repo_type == "model"
        for revision in repo.revisions
        if _ending((file.file_name for file in revision.files), WEIGHT_ENDINGS)
    ]
    return sorted(found, key=lambda model: (model.name.lower(), model.revision))


def _model_type(folder: Path) -> str:
    """The config's `model_type`, "" where there is none to read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    value = config.get("model_type") if isinstance(config, dict) else None
    return value if isinstance(value, str) else ""
