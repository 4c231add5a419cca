"""The native stack computes what the decoder in plain torch computes, in any chunks."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from opsin.decoder.cache import PagedCache
from opsin.decoder.config import AttentionConfig, DecoderConfig, LayerConfig, MLPConfig
from opsin.decoder.decoder import Decoder, Step
from opsin.errors import EngineError
from opsin.kernels import AttentionBatch, Kernels
from opsin.kernels.cpu import PackedMatrix
from opsin.kernels.cpu.stack import LayerSpec, LayerStack, NormWeights, RopeTables, StackStep
from opsin.nn.rope import RopeConfig

BLOCK, BLOCKS, VOCABULARY = 16, 24, 83

LLAMA = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden=128,
    layers=(
        LayerConfig(AttentionConfig(4, 2, 32, RopeConfig(32, 1e4)), MLPConfig(192)),
        LayerConfig(AttentionConfig(4, 2, 32, RopeConfig(32, 1e4)), MLPConfig(192)),
    ),
    max_positions=512,
)


def variant(layer: dict | None = None, attention: dict | None = None, **config) -> DecoderConfig:
    """LLAMA with some facts changed in every layer."""
    layers = tuple(
        replace(one, attention=replace(one.attention, **(attention or {})), **(layer or {}))
        for one in LLAMA.layers
    )
    return replace(LLAMA, layers=layers, **config)


VARIANTS = {
    "llama": LLAMA,
    "qwen2": variant(attention={"qkv_bias": True}, tied_head=True),
    "qwen3": variant(attention={"qk_norm": "rms"}),
    "sandwich": variant(
        {"post_norms": True, "mlp": MLPConfig(192, "gelu_tanh")},
        {"window": 20, "soft_cap": 8.0, "scale": 0.2},
        logit_soft_cap=10.0,
        norm="rms_unit_offset",
    ),
    "layer norm": variant(
        {"residual_scale": 0.5}, {"rope": RopeConfig(16, 1e4, pairs="adjacent")}, norm="layer",
        logit_scale=0.25,
    ),
}  # fmt: skip


def build(config: DecoderConfig) -> Decoder:
    """A decoder of random weights, bfloat16 values in float32."""
    torch.manual_seed(0)
    decoder = Decoder(Kernels(), config)
    for name, parameter in decoder.named_parameters():
        values = torch.randn_like(parameter)
        if "norm" in name:
            parameter.data = (1 + 0.1 * values).bfloat16().float()
        else:
            parameter.data = (values * parameter.shape[-1] ** -0.5).bfloat16().float()
    for module in decoder.modules():
        if module is not decoder and callable(getattr(module, "finish_loading", None)):
            module.finish_loading()
    decoder.finish_loading()
    return decoder


def norm_weights(module) -> NormWeights | None:
    if isinstance(module, torch.nn.Identity):
        return None
    bias = module.bias if isinstance(getattr(module, "bias", None), torch.Tensor) else None
    return NormWeights(module.weight, bias)


def native_stack(library, decoder: Decoder, kind: str, **more) -> LayerStack:
    """The same layers, packed; a quantised kind also rounds the decoder's own weights."""

    def pack(linear, *, spread: bool = False) -> PackedMatrix:
        rows, columns = linear.weight.shape
        packed = PackedMatrix(library, kind, rows, columns, group=32)
        halves = linear.weight.chunk(2) if spread else [linear.weight]
        for i, half in enumerate(halves):
            packed.fill(half, 16 * i, spread=len(halves))
        if getattr(linear, "bias", None) is not None:
            packed.fill_bias(linear.bias)
        kept = packed.rows(torch.arange(rows), torch.float32)
        if spread:
            kept = kept.unflatten(0, (-1, 2, 16)).transpose(0, 1).reshape(rows, columns)
        linear.weight.data = kept
        return packed

    specs = []
    for layer, module in zip(decoder.config.layers, decoder.layers, strict=True):
        own, attention = layer.attention, module.attention
        specs.append(
            LayerSpec(
                qkv=pack(attention.qkv), out=pack(attention.out),
                gate_up=pack(module.mlp.gate_up, spread=True), down=pack(module.mlp.down),
                heads=own.heads, kv_heads=own.kv_heads, head_dim=own.head_dim,
                attention_norm=norm_weights(module.attention_norm),
                mlp_norm=norm_weights(module.mlp_norm),
                query_norm=attention.q_norm.weight if attention.q_norm else None,
                key_norm=attention.k_norm.weight if attention.k_norm else None,
                after_attention_norm=norm_weights(module.attention_post_norm),
                after_mlp_norm=norm_weights(module.mlp_post_norm),
                rotary_dim=own.rope.dim, rope_interleaved=own.rope.pairs == "adjacent",
                window=own.window, activation=layer.mlp.activation,
                attention_scale=attention.scale, attention_softcap=own.soft_cap,
                residual_scale=layer.residual_scale,
            )
        )  # fmt: skip
    head = pack(decoder.embedding if decoder.head is None else decoder.head)
    config = decoder.config
    return LayerStack(
        library, specs, dim=config.hidden, final_norm=norm_weights(decoder.norm), head=head,
        norm_eps=config.norm_eps, layer_norm=config.norm == "layer",
        logit_scale=config.logit_scale, logit_softcap=config.logit_soft_cap, **more,
    )  # fmt: skip


class Session:
    """Two sequences of fixed random tokens, in blocks of one cache, run in any pieces."""

    def __init__(self, decoder: Decoder, stack: LayerStack | None) -> None:
        dtype = torch.float32 if stack is None else torch.bfloat16
        self.decoder, self.stack = decoder, stack
        place = torch.device("cpu")
        native = stack is not None
        self.cache = PagedCache(decoder.config, BLOCKS, BLOCK, dtype, place, by_head=native)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.fill_(torch.nan if stack is not None else 0)
        if stack is not None:
            stack.bind(self.cache.keys, self.cache.values, BLOCK)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, VOCABULARY, (2, 150), generator=generator)
        self.tables = torch.randperm(BLOCKS, generator=generator)[:20].view(2, 10)

    def run(self, pieces: list[tuple[int, int, int]], adds=None, **changes) -> torch.Tensor:
        """Logits of every token of pieces (sequence, start, end); `changes` are to a native step,
        whose largest logits are checked and left in `likeliest`.
        """
        ids = torch.cat([self.tokens[s, a:b] for s, a, b in pieces])
        position = torch.cat([torch.arange(a, b) for _, a, b in pieces])
        tables = self.tables[[s for s, _, _ in pieces]]
        sizes = [b - a for _, a, b in pieces]
        starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        owner = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(sizes))
        slots = tables[owner, position // BLOCK] * BLOCK + position % BLOCK
        rows = torch.arange(len(ids))
        contexts = [b for _, _, b in pieces]
        embeds = self.decoder.embed(ids)
        if self.stack is None:
            where = [
                t[torch.arange(c) // BLOCK] * BLOCK + torch.arange(c) % BLOCK
                for t, c in zip(tables, contexts, strict=True)
            ]
            batch = AttentionBatch(slots, starts, contexts, where, tables, BLOCK)
            step = Step(embeds, position[None], batch, rows, adds or {})
            return self.decoder(step, self.cache)
        angles = self.decoder.angles.at(position[None])
        step = StackStep(
            hidden=embeds.clone(), query_start=starts, num_keys=contexts,
            block_tables=tables.tolist(), rope=RopeTables(list(angles.values())),
            logit_rows=rows.tolist(), adds=adds or {},
        )  # fmt: skip
        logits, self.likeliest = self.stack.run(replace(step, **changes))
        assert logits is None or self.likeliest == logits.numpy().argmax(-1).tolist()
        return logits

    def ids(self, *pieces: tuple[int, int, int]) -> list[int]:
        """The tokens of pieces."""
        return [token for s, a, b in pieces for token in self.tokens[s, a:b].tolist()]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("bf16", 0.02), ("bf13", 0.02), ("q8", 0.04), ("q6", 0.04), ("q5", 0.04), ("q4", 0.04)],
)
def test_stack_equals_the_decoder(best, name, kind, tolerance):
    if name == "sandwich" and kind.startswith("q"):
        tolerance = 0.06  # norms after each block double every error: 0.019 at 16 bits already
    decoder = build(VARIANTS[name])
    stack = native_stack(best, decoder, kind)
    plain, native = Session(decoder, None), Session(decoder, stack)
    for pieces in ([(0, 0, 40)], [(0, 40, 41), (1, 0, 25)], [(0, 41, 42), (1, 25, 26)]):
        want, got = plain.run(pieces), native.run(pieces)
        assert (got - want).norm() <= tolerance * want.norm()


def test_every_instruction_set_runs_the_stack(native):
    decoder = build(VARIANTS["qwen3"])
    stack = native_stack(native, decoder, "q8")
    want = Session(decoder, None).run([(0, 0, 70), (1, 0, 3)])
    got = Session(decoder, stack).run([(0, 0, 70), (1, 0, 3)])
    assert (got - want).norm() <= 0.04 * want.norm()


@pytest.mark.parametrize("kind", ["bf16", "bf13", "q8", "q6", "q5", "q4"])
def test_logits_are_the_same_bits_in_any_chunks_batch_and_threads(native, kind):
    decoder = build(VARIANTS["qwen3"])
    stack = native_stack(native, decoder, kind)
    whole = Session(decoder, stack).run([(0, 0, 150)])
    chunked = Session(decoder, stack)
    cuts = [0, 1, 2, 9, 50, 51, 131, 149, 150]
    parts = [chunked.run([(0, a, b), (1, a // 2, a // 2 + 1)])[: b - a] for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    native.configure(native.isa, 3)
    assert torch.equal(Session(decoder, stack).run([(0, 0, 150)]), whole)


def test_rows_are_added_after_their_layer(best):
    decoder = build(LLAMA)
    stack = native_stack(best, decoder, "bf16")
    adds = {0: (torch.tensor([2, 5]), torch.randn(2, 128))}
    want = Session(decoder, None).run([(0, 0, 9)], adds)
    got = Session(decoder, stack).run([(0, 0, 9)], adds)
    assert (got - want).norm() <= 0.02 * want.norm()
    bare = Session(decoder, stack).run([(0, 0, 9)])
    assert not torch.equal(bare[2:], got[2:])


@pytest.mark.parametrize("kind", ["bf16", "bf13", "q8", "q6", "q4"])
def test_token_ids_are_the_same_bits_as_their_rows(native, kind):
    decoder = build(LLAMA)
    table = PackedMatrix.dense(native, decoder.embedding.weight, kind, group=32)
    stack = native_stack(native, decoder, kind, embedding=table, embedding_scale=11.3)
    given, read = Session(decoder, stack), Session(decoder, stack)
    for pieces in ([(0, 0, 40), (1, 0, 1)], [(0, 40, 41), (1, 1, 2)], [(1, 2, 3)]):
        ids = given.ids(*pieces)
        want = given.run(pieces, hidden=table.rows(ids, torch.float32).mul_(11.3))
        assert torch.equal(read.run(pieces, hidden=None, token_ids=ids), want)
        again = read.run(pieces, hidden=None, token_ids=ids, wants_logits=False)
        assert again is None
        assert read.likeliest == given.likeliest


def test_rows_of_longer_rope_tables_are_the_same_bits(best):
    decoder = build(LLAMA)
    stack = native_stack(best, decoder, "q8")
    angles = RopeTables(list(decoder.angles.at(torch.arange(64)[None]).values()))
    pieces = [(0, 0, 40), (1, 0, 2)]
    places = [*range(40), 0, 1]
    want = Session(decoder, stack).run(pieces)
    assert torch.equal(Session(decoder, stack).run(pieces, rope=angles, rope_rows=places), want)


def headed(library, weight: torch.Tensor, **more) -> LayerStack:
    """A head without layers."""
    norm, head = NormWeights(torch.ones(weight.shape[1])), PackedMatrix.dense(library, weight)
    stack = LayerStack(library, [], dim=64, final_norm=norm, head=head, norm_eps=1e-6, **more)
    stack.bind([], [], BLOCK)
    return stack


def headed_step(hidden: torch.Tensor, rows: list[int]) -> StackStep:
    count = len(hidden)
    return StackStep([0, count], [count], [[0]], RopeTables([]), rows, hidden=hidden.clone())


@pytest.mark.parametrize("vocabulary", [1, 7, 8192, 8193, 20_000])
@pytest.mark.parametrize("cap", [None, 1e-6])
def test_the_first_largest_of_each_row_is_found(native, vocabulary, cap):
    half = (vocabulary + 1) // 2
    weight = torch.randn(half, 64).repeat(2, 1)[:vocabulary].bfloat16()  # every logit comes twice
    hidden = torch.randn(9, 64)
    hidden[4] = 0  # all logits are alike
    hidden[5] = torch.nan
    rows = [8, 0, 4, 3, 5, 4]
    for odd in ([], [vocabulary - 1], [vocabulary // 3, vocabulary - 1]):
        weight[odd] = torch.nan
        stack = headed(native, weight, logit_softcap=cap)
        logits, likeliest = stack.run(headed_step(hidden, rows))
        assert likeliest == logits.numpy().argmax(-1).tolist()
        for row, expected in zip(rows, likeliest, strict=True):
            step = replace(headed_step(hidden, [row]), wants_logits=False)
            assert stack.run(step) == (None, [expected])


def test_tokens_and_blocks_that_are_not_there_are_refused(best):
    decoder = build(LLAMA)
    table = PackedMatrix.dense(best, decoder.embedding.weight)
    session = Session(decoder, native_stack(best, decoder, "bf16", embedding=table))
    for ids in ([VOCABULARY, 1], [0, -1]):
        with pytest.raises(EngineError, match="out of range"):
            session.run([(0, 0, 2)], hidden=None, token_ids=ids)
    for changes in ({"hidden": None, "token_ids": [1]}, {"query_start": [0, 18]}):
        with pytest.raises(ValueError, match="has others"):
            session.run([(0, 0, 17)], **changes)
    for changes in ({"block_tables": [[3]]}, {"num_keys": [16]}):
        with pytest.raises(EngineError, match="out of range"):
            session.run([(0, 0, 17)], **changes)
    bare = Session(decoder, native_stack(best, decoder, "bf16"))
    with pytest.raises(EngineError, match="out of range"):
        bare.run([(0, 0, 2)], hidden=None, token_ids=[1, 2])


def test_wrong_caches_and_hidden_are_refused(best):
    decoder = build(LLAMA)
    stack = native_stack(best, decoder, "bf16")
    with pytest.raises(ValueError, match="bfloat16 rows"):
        stack.bind([torch.zeros(2, 2, 16, 32)] * 2, [torch.zeros(2, 2, 16, 32)] * 2, 16)
    with pytest.raises(ValueError, match="does not fit"):
        stack.bind(*[[torch.zeros(2, 1, 16, 32).bfloat16()] * 2] * 2, 16)
    with pytest.raises(ValueError, match="does not fit"):
        stack.bind(*[[torch.zeros(32, 2, 32).bfloat16()] * 2] * 2, 16)
