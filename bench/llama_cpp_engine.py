"""llama.cpp through llama-cpp-python as an engine of bench/cpu.py; runs with that package's Python.

    python bench/llama_cpp_engine.py FOLDER --bits 4 --threads 2 --picture FILE

FOLDER holds the files of bench/gguf_files.py; those of 4 and 8 bits are made here by llama.cpp's
own quantiser (Q4_0, Q8_0). PICTURE is 1024 x 768 x 3 bytes. Flash attention is on; weights are
mapped, which is its default, and repacked where this machine has a faster layout, which is too.
Built by GCC 12 for a machine with AMX it ends at the first 4-bit product: the compiler drops what a
tile's configuration is read from. With its amx/mmq.cpp compiled by -fno-tree-dse -fno-dse it runs;
LLAMA_CPP_LIB_PATH names the folder of libraries so built.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cpu_rows as rows
import llama_cpp
import numpy as np

WIDTH, HEIGHT = 1024, 768
MAX_CONTEXT, BATCH, UBATCH = 1280, 2048, 512
KINDS = {4: ("q4_0", 2), 8: ("q8_0", 7)}  # bits -> name and llama.cpp's number of a file's kind


def text_file(folder: Path, bits: int, threads: int) -> Path:
    """The decoder's file, quantised once where fewer bits are asked."""
    if bits == 16:
        return folder / "text-bf16.gguf"
    name, kind = KINDS[bits]
    target = folder / f"text-{name}.gguf"
    if not target.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = kind, threads
        source = str(folder / "text-bf16.gguf").encode()
        partial = target.with_suffix(".part")
        if llama_cpp.llama_model_quantize(source, str(partial).encode(), ctypes.byref(params)):
            raise SystemExit("llama.cpp did not quantise the file")
        partial.rename(target)
    return target


class LlamaCpp:
    """A model and what the rows ask of it."""

    def __init__(self, text: Path, tower: Path, picture: bytes, threads: int) -> None:
        self.threads, self.picture, self.tower_path = threads, picture, tower
        self.model = llama_cpp.llama_model_load_from_file(
            str(text).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {text}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.num_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.tower = None
        self.single = self.new_context(1, MAX_CONTEXT)

    def new_context(self, sequences: int, length: int) -> llama_cpp.llama_context_p:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * sequences, sequences
        params.n_batch, params.n_ubatch = BATCH, UBATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return llama_cpp.llama_init_from_model(self.model, params)

    @contextmanager
    def fresh(self, context: llama_cpp.llama_context_p) -> Iterator[None]:
        """With nothing cached."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        yield

    def decode(
        self, context: llama_cpp.llama_context_p, entries: list[tuple[int, int, int, bool]]
    ) -> None:
        """One batch of (token, position, sequence, wants logits)."""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp could not compute a batch")
        llama_cpp.llama_batch_free(batch)

    def best(self, context: llama_cpp.llama_context_p, row: int) -> int:
        """The likeliest token of one row of logits."""
        logits = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.num_vocab,)).argmax())

    def generate(self, position: int, count: int) -> list[float]:
        """The moments of `count` tokens after what the cache holds, whose logits are ready."""
        times = []
        for i in range(count):
            token = self.best(self.single, -1)
            times.append(rows.now())
            if i + 1 < count:
                self.decode(self.single, [(token, position + i, 0, True)])
        return times

    def prompt(self, ids: list[int]) -> None:
        last = len(ids) - 1
        self.decode(self.single, [(t, i, 0, i == last) for i, t in enumerate(ids)])

    def row_decode(self) -> rows.Figures:
        with self.fresh(self.single):
            self.prompt(rows.text_ids(rows.SHORT))
            return {"decode": rows.rate(self.generate(rows.SHORT, 1 + rows.NEW_TOKENS))}

    def row_prefill(self) -> rows.Figures:
        with self.fresh(self.single):
            start = rows.now()
            self.prompt(rows.text_ids(rows.PREFILL))
            self.best(self.single, -1)
            return {"prefill": rows.PREFILL / rows.since(start)}

    def row_streams(self) -> rows.Figures:
        context = self.new_context(rows.STREAMS, 256)
        prompts = [rows.text_ids(rows.SHORT, s) for s in range(rows.STREAMS)]
        times: list[list[float]] = [[] for _ in prompts]
        entries = [
            (t, i, s, i == len(ids) - 1) for s, ids in enumerate(prompts) for i, t in enumerate(ids)
        ]
        self.decode(context, entries)
        wanted = [i for i, entry in enumerate(entries) if entry[3]]
        for step in range(rows.STREAM_TOKENS):
            tokens = [self.best(context, row) for row in wanted]
            for own in times:
                own.append(rows.now())
            position = rows.SHORT + step
            self.decode(context, [(t, position, s, True) for s, t in enumerate(tokens)])
            wanted = list(range(rows.STREAMS))
        llama_cpp.llama_free(context)
        return {"streams": rows.streams_rate(times)}

    def row_picture(self) -> rows.Figures:
        if self.tower is None:
            self.tower = self.load_tower()
        with self.fresh(self.single):
            start = rows.now()
            position = self.see()
            times = self.generate(position, 1 + rows.AFTER_PICTURE)
        return {"ttft_picture": times[0] - start, "decode_picture": rows.rate(times)}

    def load_tower(self) -> Any:
        from llama_cpp import mtmd_cpp

        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.warmup = False, False, False
        params.n_threads = self.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        tower = mtmd_cpp.mtmd_init_from_file(str(self.tower_path).encode(), self.model, params)
        if tower is None:
            raise SystemExit(f"llama.cpp does not load {self.tower_path}")
        return tower

    def see(self) -> int:
        """Prepare the picture, encode it and fill the cache; the next position."""
        from llama_cpp import mtmd_cpp

        pixels = (ctypes.c_uint8 * len(self.picture)).from_buffer_copy(self.picture)
        bitmap = mtmd_cpp.mtmd_bitmap_init(WIDTH, HEIGHT, pixels)
        words = b"abcdefghij" + mtmd_cpp.mtmd_default_marker() + b"abcdefghij"
        text = mtmd_cpp.mtmd_input_text(text=words, text_len=len(words), parse_special=True)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd_cpp.mtmd_tokenize(self.tower, chunks, ctypes.byref(text), bitmaps, 1):
            raise SystemExit("llama.cpp does not take the picture")
        self.num_tokens = mtmd_cpp.mtmd_helper_get_n_tokens(chunks)
        after = llama_cpp.llama_pos()
        failed = mtmd_cpp.mtmd_helper_eval_chunks(
            self.tower, self.single, chunks, 0, 0, BATCH, True, ctypes.byref(after)
        )
        if failed:
            raise SystemExit("llama.cpp could not compute the picture")
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        return after.value

    def row_tokens(self) -> rows.Figures:
        return {"prompt_tokens": self.num_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=[4, 8, 16], default=16)
    parser.add_argument("--tower", default="f16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--only-files", action="store_true", help="quantise, and run nothing")
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    text = text_file(args.folder, args.bits, args.threads)
    if args.only_files:
        return
    start = rows.now()
    tower = args.folder / f"tower-{args.tower}.gguf"
    engine = LlamaCpp(text, tower, args.picture.read_bytes(), args.threads)
    names = ("decode", "prefill", "streams", "picture", "tokens")
    asked = {name: getattr(engine, f"row_{name}") for name in names}
    rows.answer(asked, rows.since(start))


if __name__ == "__main__":
    main()
