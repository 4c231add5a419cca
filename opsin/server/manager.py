"""Which models are loaded: on demand, in a thread, never at the cost of one that serves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opsin import api
from opsin.checkpoint.hub import BUNDLED, BUNDLED_FOLDER, CachedModel, cached_models, resolve
from opsin.engine.fallback import engine_of
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.model import Model
from opsin.engine.processor import Processor
from opsin.errors import EngineError, NotFoundError, OpsinError
from opsin.kernels.memory import give_back_freed
from opsin.prompt.token_bytes import TokenNames
from opsin.server.settings import ServeSettings

DEFAULT = "default"

_log = logging.getLogger("opsin.server")


@dataclass(eq=False, slots=True)
class Loaded:
    """A model that serves: under which names, and how many requests hold it."""

    name: str
    aliases: frozenset[str]
    model: Model
    processor: Processor
    engine: Engine
    names: TokenNames
    created: int = field(default_factory=lambda: int(time.time()))
    leases: int = 0
    last_used: float = field(default_factory=time.monotonic)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    expiry: asyncio.TimerHandle | None = None

    def answers_to(self, name: str) -> bool:
        """Whether a request may call it so."""
        return name == self.name or name in self.aliases


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: its name, where to look for it, and the names it will have."""

    where: str
    name: str
    aliases: frozenset[str] = frozenset()
    revision: str | None = None
    local: bool = False
    own: bool = False


class Manager:
    """The loaded models; every method runs in the event loop's thread."""

    def __init__(
        self,
        settings: ServeSettings,
        on_load: Callable[[str], None] = lambda result: None,
    ) -> None:
        self.settings = settings
        self.loaded: list[Loaded] = []
        self._on_load = on_load
        self._changing = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "opsin-load")
        self._tasks: set[asyncio.Task[Any]] = set()  # loading and freeing
        self.closed = False

    # Names.

    def _own(self) -> Source:
        """The model of --model, or the bundled one."""
        where = self.settings.model or BUNDLED
        folder = Path(where).expanduser()
        names = self.settings.served_model_name
        own = folder.resolve().name if folder.is_dir() and where != BUNDLED else where
        return Source(
            where,
            names[0] if names else own,
            frozenset({*names, own, where}),
            self.settings.revision,
            local=True,
            own=True,
        )

    def find(self, name: str) -> Loaded | None:
        """The loaded model of a name; "default" is the one used last."""
        if name in ("", DEFAULT):
            return max(self.loaded, key=lambda model: model.last_used, default=None)
        return next((model for model in self.loaded if model.answers_to(name)), None)

    def _source(self, name: str, *, download: bool) -> Source:
        """Where a model that is not loaded comes from; NotFoundError where it may not be loaded."""
        own = self._own()
        if name in ("", DEFAULT) or name == own.name or name in own.aliases:
            return own
        if name == BUNDLED:
            return Source(BUNDLED, BUNDLED)
        allowed = self.settings.load_on_demand
        if allowed == "never" or (allowed == "cached" and not download and not _is_cached(name)):
            raise NotFoundError(
                f"Model {name[:200]} was not found",
                why="it is not loaded"
                if allowed == "never"
                else "it is neither loaded nor in the local cache",
                remedy="GET /v1/models lists those there are",
                param="model",
            )
        return Source(name, name)

    # Using models.

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Loaded]:
        """The model of a name, loaded if need be, and kept until the block ends."""
        model = self.find(name)
        if model is not None and not model.engine.alive:
            _log.error("The engine of %s has ended: loading it again.", model.name)
            self._retire(model)
            model = None
        if model is None:
            model = await self.load(name)
        self._hold(model)
        try:
            yield model
        finally:
            self._let_go(model)

    def _hold(self, model: Loaded) -> None:
        model.leases += 1
        model.idle.clear()
        model.last_used = time.monotonic()
        if model.expiry is not None:
            model.expiry.cancel()
            model.expiry = None

    def _let_go(self, model: Loaded) -> None:
        model.leases -= 1
        model.last_used = time.monotonic()
        if model.leases == 0:
            model.idle.set()
            self._watch(model)

    def _watch(self, model: Loaded) -> None:
        """Unload an idle model when its time is over."""
        if self.settings.unload_after is not None and model in self.loaded:
            loop = asyncio.get_running_loop()
            model.expiry = loop.call_later(self.settings.unload_after, self._retire, model)

    # Loading and unloading.

    async def load(self, name: str, *, download: bool = False) -> Loaded:
        """Load a model; those that serve go on serving, and stay if this fails.

        A caller that goes away leaves the loading to end by itself: what it loads is not lost.
        """
        task = asyncio.get_running_loop().create_task(self._load(name, download=download))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.debug("A model was not loaded or freed.", exc_info=task.exception())

    async def _load(self, name: str, *, download: bool) -> Loaded:
        async with self._changing:
            found = self.find(name)
            if found is not None:
                return found
            if self.closed:
                raise EngineError("The server is stopping", remedy="Try again later")
            loop = asyncio.get_running_loop()
            source = await loop.run_in_executor(
                self._thread, lambda: self._source(name, download=download)
            )
            if source.own and (found := self.find(source.name)):
                return found
            folder = await loop.run_in_executor(self._thread, _resolved, source)
            evicted = await self._make_room(folder)
            try:
                model = await loop.run_in_executor(self._thread, self._read, source, folder)
            except OpsinError:
                self._on_load("failed")
                await self._bring_back(evicted)
                raise
            self._on_load("loaded")
            self.loaded.append(model)
            self._watch(model)
            while len(self.loaded) > self.settings.max_models:
                self._retire(min(self.loaded, key=lambda one: one.last_used))
            return model

    async def _make_room(self, folder: Path) -> list[str]:
        """Unload the models used longest ago while the new one does not fit beside them."""
        evicted = []
        while self.loaded and _weights_size(folder) * 1.2 > available_memory(self.loaded[0]):
            oldest = min(self.loaded, key=lambda one: one.last_used)
            evicted.append(oldest.name)
            await self._retire(oldest)
        return evicted

    async def _bring_back(self, names: list[str]) -> None:
        """Load again what made room for a model that then failed."""
        loop = asyncio.get_running_loop()
        for name in names:
            source = self._source(name, download=False)
            folder = await loop.run_in_executor(self._thread, _resolved, source)
            model = await loop.run_in_executor(self._thread, self._read, source, folder)
            self.loaded.append(model)
            self._watch(model)

    def _read(self, source: Source, folder: Path) -> Loaded:
        """Read a checkpoint and start its engine; in the loading thread."""
        started = time.perf_counter()
        settings = self.settings
        try:
            model, processor = api.load(
                str(folder),
                device=settings.device,
                dtype=settings.dtype,
                quantize=settings.quant,
                repacked_cache=settings.repacked_cache,
                chat_template=settings.chat_template if source.own else None,
                media_limits=settings.media_limits(),
                matformer_config=settings.matformer_config if source.own else None,
                matformer_slice=settings.matformer_slice if source.own else None,
            )
            processor.fetched.max_bytes = settings.fetched_cache
            if processor.prepared.max_bytes:  # a model of Transformers' keeps none
                processor.prepared.max_bytes = settings.prepared_cache
            engine = engine_of(model, processor, engine_limits(settings))
        except OpsinError:
            raise
        except Exception as error:  # whatever is wrong with it, the models that serve go on
            _log.exception("Loading %s failed.", source.name)
            raise EngineError(
                f"Model {source.name} could not be loaded",
                why=type(error).__name__,
                remedy="The server's log says more",
                param="model",
            ) from error
        if processor.chat_template is not None:
            processor.chat_template.warm_up()
        _log.info("Loaded %s in %.1f s.", source.name, time.perf_counter() - started)
        names = TokenNames(processor.tokenizer)
        return Loaded(source.name, source.aliases, model, processor, engine, names)

    async def unload(self, name: str) -> str:
        """Unload a model once its requests are done; returns its name."""
        model = self.find(name)
        if model is None:
            raise NotFoundError(
                f"Model {name[:200]} is not loaded",
                remedy="GET /v1/models says which are",
                param="model",
            )
        await asyncio.shield(self._retire(model))
        return model.name

    def _retire(self, model: Loaded) -> asyncio.Task[None]:
        """Take a model out at once and free it when its last request is done."""
        if model in self.loaded:
            self.loaded.remove(model)
        if model.expiry is not None:
            model.expiry.cancel()
            model.expiry = None
        task = asyncio.get_running_loop().create_task(self._free(model))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _free(self, model: Loaded) -> None:
        while model.leases:
            await model.idle.wait()
        await asyncio.get_running_loop().run_in_executor(self._thread, _free, model)
        _log.info("Unloaded %s.", model.name)

    async def close(self) -> None:
        """End every engine; requests that still run get their last event."""
        self.closed = True
        loop = asyncio.get_running_loop()
        while self.loaded or self._tasks:
            for model in list(self.loaded):
                await loop.run_in_executor(None, model.engine.close)
                self._retire(model)
            await asyncio.wait(self._tasks)
        self._thread.shutdown(wait=False)


def engine_limits(settings: ServeSettings) -> EngineLimits:
    """What an engine of this server may use."""
    return EngineLimits(
        max_num_seqs=settings.max_num_seqs,
        # Admission counts places for all models together; an engine must hold what it let in.
        max_queue=settings.max_num_seqs + settings.max_queue,
        prefill_step_size=settings.prefill_step_size,
        memory=settings.memory,
        max_context=settings.max_context,
        prefix_cache=settings.prefix_cache,
        media_cache=settings.media_cache,
        kv_bits=settings.kv_bits,
        kv_group_size=settings.kv_group_size,
        quantized_kv_start=settings.quantized_kv_start,
        max_kv_size=settings.max_kv_size,
        speculative=settings.speculative,
    )


def _is_cached(name: str) -> bool:
    return any(model.name == name.partition(":")[0] for model in cached_models())


def _resolved(source: Source) -> Path:
    return resolve(source.where, source.revision, local=source.local)


def _weights_size(folder: Path) -> int:
    return sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")
    )


def available_memory(beside: Loaded) -> int:
    """Bytes that another model could take where this one lies."""
    if beside.model.device.type == "cuda":
        return torch.cuda.mem_get_info(beside.model.device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: let the system judge when the memory is asked for
        return sys.maxsize
    held = dict(line.split(":", 1) for line in lines)
    return int(held["MemAvailable"].split()[0]) * 1024


def resident_memory() -> int:
    """Bytes of this process in main memory, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _free(model: Loaded) -> None:
    """Give a model's memory back to the system; in the loading thread."""
    model.engine.close()
    model.model.engine = None
    model.model.processor = None
    for slot in ("model", "engine"):
        delattr(model, slot)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_freed()


def listed_models(manager: Manager) -> list[tuple[str, int, CachedModel | None]]:
    """Names of models a request may give: loaded ones, the server's own, those in the cache."""
    found: dict[str, tuple[int, CachedModel | None]] = {}
    for model in manager.loaded:
        found[model.name] = (model.created, None)
    own = manager._own()
    found.setdefault(own.name, (0, None))
    if (BUNDLED_FOLDER / "config.json").is_file():
        found.setdefault(BUNDLED, (0, None))
    if manager.settings.load_on_demand != "never":
        for cached in cached_models():
            found.setdefault(cached.name, (0, cached))
    return [(name, created, cached) for name, (created, cached) in found.items()]
