"""Products with packed weights equal their twins, at every shape, and bit for bit at every M."""

import numpy as np
import pytest
import torch

from opsin.errors import EngineError
from opsin.kernels.cpu import PackedMatrix
from opsin.kernels.cpu.twins import affine_linear, quantise_rows
from opsin.kernels.packed import PlainMatrix
from opsin.quant.affine import dequantise, quantise, unpack_codes
from opsin.quant.formats import Format
from opsin.quant.rotation import rotate


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows, k) as little-endian bit fields in words, the MLX layout."""
    flags = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = np.packbits(flags.reshape(codes.shape[0], -1), axis=-1, bitorder="little")
    return torch.from_numpy(stream.view(np.int32).copy())


def affine(n: int, k: int, group: int, bits: int, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(n + k + bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, k // group) * 0.01 + 0.001).to(dtype)
    biases = (-scales.float() * 2 ** (bits - 1) + torch.randn(n, k // group) * 0.001).to(dtype)
    return codes, scales, biases


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest value."""
    assert got.shape == want.shape
    if want.numel():
        assert (got.float() - want).abs().max() <= tolerance * want.abs().max()


def test_words_unpack_to_the_codes_that_were_packed():
    codes = torch.randint(0, 8, (3, 64), dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_words(codes, 3), 3, 64), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_affine_product_equals_its_twin(native, bits, group):
    n, k = 37, 384
    codes, scales, biases = affine(n, k, group, bits)
    x = torch.randn(19, k)
    whole, product = dequantise(codes, scales, biases), affine_linear(x, codes, scales, biases)
    for kind in ("q4", "q5", "q6", "q8")[max(bits - 4, 0) if bits < 8 else 3 :]:
        packed = PackedMatrix(native, kind, n, k, group=group, scale_dtype=torch.bfloat16)
        packed.fill_affine(pack_words(codes, bits), scales, biases, bits)
        kept = packed.rows(torch.arange(n), torch.float32)
        assert torch.allclose(kept, whole, atol=1e-6)
        close(packed.multiply(x), product, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 70])
@pytest.mark.parametrize(("kind", "bits", "group"), [("q4", 4, 128), ("q5", 5, 64), ("q6", 6, 64)])
def test_every_row_count_and_scale_type(native, kind, bits, group, rows, dtype):
    codes, scales, biases = affine(50, 256, group, bits, dtype)
    packed = PackedMatrix(native, kind, 50, 256, group=group, scale_dtype=dtype)
    packed.fill_affine(pack_words(codes, bits), scales, biases, bits)
    bias = torch.randn(50)
    packed.fill_bias(bias)
    x = torch.randn(rows, 256)
    close(packed.multiply(x), affine_linear(x, codes, scales, biases, bias), 2e-6)


@pytest.mark.parametrize("kind", ["q8", "q6", "q5", "q4"])
@pytest.mark.parametrize("k", [96, 100, 257])
def test_one_scale_a_row_takes_any_width(native, kind, k):
    weight = torch.randn(21, k) * 0.05
    packed = PackedMatrix.dense(native, weight, kind, group=0)
    x = torch.randn(9, k)
    kept = packed.rows(torch.arange(21), torch.float32)
    step = weight.abs().max() / {"q8": 127, "q6": 31.5, "q5": 15.5, "q4": 7.5}[kind]
    assert (kept - weight).abs().max() <= (0.6 if kind == "q8" else 2.5) * step
    close(packed.multiply(x), x @ kept.T, 0.02)


@pytest.mark.parametrize("rows", [1, 16, 33, 200])
@pytest.mark.parametrize(
    ("kind", "group"), [("q8", 32), ("q8", 64), ("q8", 128), ("q6", 32), ("q5", 32), ("q4", 128)]
)
def test_one_group_may_be_the_whole_row(native, kind, group, rows):
    torch.manual_seed(rows)
    packed = PackedMatrix.dense(native, torch.randn(320, group) * 0.05, kind, group=group)
    x = torch.randn(rows, group)
    close(packed.multiply(x), x @ packed.rows(torch.arange(320), torch.float32).T, 0.02)


@pytest.mark.parametrize("rows", [1, 7, 20])
@pytest.mark.parametrize(
    ("kind", "group", "k", "scales"),
    [
        ("q4", 64, 192, torch.float16),
        ("q4", 128, 256, torch.uint8),
        ("q4", 32, 96, torch.uint8),
        ("q5", 64, 192, torch.float16),
        ("q5", 64, 192, torch.uint8),
        ("q5", 32, 96, torch.uint8),
        ("q6", 64, 192, torch.float16),
        ("q6", 128, 128, torch.uint8),
        ("q8", 32, 96, torch.float16),
        ("q8", 0, 160, torch.float16),
    ],
)
def test_columns_mixed_on_both_sides_leave_the_product(native, kind, group, k, scales, rows):
    torch.manual_seed(k)
    weight, x = torch.randn(40, k) * 0.05, torch.randn(rows, k)
    form = Format(kind, group, scales, rotated=True)
    packed, plain = PackedMatrix.empty(native, form, 40, k), PlainMatrix(form, 40, k, x.device)
    for matrix in (packed, plain):
        matrix.fill(weight)
    if group and scales == torch.float16:
        assert plain.nbytes * 8 == form.bits * 40 * k
        assert packed.nbytes * 8 == form.bits * 48 * k, "rows are kept by sixteen"
    codes, steps = quantise_rows(rotate(x), group or k)
    seen = rotate((codes.float() * steps[..., None]).flatten(1))
    kept = packed.rows(torch.arange(40), torch.float32)
    close(packed.multiply(x), seen @ kept.T, 1e-5)
    close(plain.multiply(x), x @ plain.rows(torch.arange(40), torch.float32).T, 1e-5)
    whole = dequantise(*quantise(weight, form))
    close(plain.rows(torch.arange(40), torch.float32), rotate(whole), 1e-6)
    assert (rotate(rotate(x)) - x).abs().max() < 1e-5


def test_a_column_far_out_costs_the_others_little_where_columns_are_mixed(native):
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128) * 0.02, torch.randn(5, 128)
    x[:, 7] *= 100
    weight[:, 7] = 0
    want = x @ weight.T
    errors = []
    for rotated in (False, True):
        packed = PackedMatrix.dense(native, weight, "q8", rotated=rotated)
        errors.append(float((packed.multiply(x) - want).norm() / want.norm()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("k", [32, 100, 260])
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 130])
def test_bfloat16_product_equals_torch(native, rows, k):
    torch.manual_seed(rows)
    weight = torch.randn(45, k).bfloat16()
    x = torch.randn(rows, k).bfloat16()
    packed = PackedMatrix.dense(native, weight, bias=torch.ones(45))
    want = x.float() @ weight.float().T + 1
    close(packed.multiply(x, out_dtype=torch.float32), want, 2e-6)
    close(packed.multiply(x.float(), out_dtype=torch.float32), want, 2e-6)
    close(packed.multiply(x), want, 4e-3)
    assert torch.equal(packed.rows(torch.tensor([44, 0])), weight[[44, 0]])


@pytest.mark.parametrize(
    ("kind", "group", "rotated"),
    [
        ("bf16", 0, False),
        ("bf13", 0, False),
        ("q8", 64, False),
        ("q6", 64, False),
        ("q4", 64, False),
        ("q4", 128, True),
        ("q8", 128, False),
        ("q8", 0, False),
        ("q8", 64, True),
        ("q6", 32, True),
        ("q4", 32, True),
    ],
)
def test_a_row_is_the_same_bits_beside_any_rows_and_on_any_threads(native, kind, group, rotated):
    torch.manual_seed(0)
    k = 448 if kind == "bf13" else 900 if group == 0 else 512
    weight = torch.randn(130, k) * 0.02
    packed = PackedMatrix.dense(native, weight, kind, group=group, rotated=rotated)
    x = torch.randn(205, k)  # more than any panel
    whole = packed.multiply(x)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17, 39, 40, 64, 65):
        for start in (0, 81):
            assert torch.equal(
                packed.multiply(x[start : start + rows]), whole[start : start + rows]
            )
    for threads in (1, 3, 4):
        native.configure(native.isa, threads)
        assert torch.equal(packed.multiply(x), whole)
        assert torch.equal(packed.multiply(x[:3]), whole[:3])


@pytest.mark.parametrize("rows", [7, 70])
@pytest.mark.parametrize(
    ("kind", "group"), [("bf16", 0), ("bf13", 0), ("q8", 64), ("q6", 64), ("q4", 64), ("q8", 0)]
)
def test_gate_and_up_alternate(native, kind, group, rows):
    torch.manual_seed(1)
    gate, up = torch.randn(2, 48, 128) * 0.1
    packed = PackedMatrix(native, kind, 96, 128, group=group)
    packed.fill(gate, 0, spread=2)
    packed.fill(up, 16, spread=2)
    alone = [PackedMatrix.dense(native, w, kind, group=group) for w in (gate, up)]
    x = torch.randn(rows, 128)
    a, b = (m.multiply(x) for m in alone)
    got = packed.multiply(x, gated=True, activation="silu")
    assert torch.allclose(got, torch.nn.functional.silu(a) * b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 17, 33, 100, 131])
def test_bias_and_activation_follow_one_scale_a_row(native, rows):
    torch.manual_seed(rows)
    packed = PackedMatrix.dense(native, torch.randn(72, 832) * 0.05, "q8", group=0)
    bias, x = torch.randn(72), torch.randn(rows, 832)
    plain = packed.multiply(x)
    packed.fill_bias(bias)
    want = torch.nn.functional.gelu(plain + bias, approximate="tanh")
    close(packed.multiply(x, activation="gelu_tanh"), want, 1e-5)
    kept = packed.rows(torch.arange(72), torch.float32)
    steps = x.abs().amax(dim=1, keepdim=True) / 127
    close(plain, (x / steps).round() * steps @ kept.T, 1e-5)


def test_what_is_not_finite_stays_so(native):
    for kind, rotated in (
        ("bf16", False), ("bf13", False), ("q8", False), ("q6", False), ("q4", False), ("q4", True),
    ):  # fmt: skip
        packed = PackedMatrix.dense(native, torch.rand(16, 128) + 1, kind, rotated=rotated)
        x = torch.ones(3, 128)
        x[1, 5] = torch.nan
        x[2, 7] = torch.inf
        out = packed.multiply(x)
        assert out[0].isfinite().all()
        assert not out[1:].isfinite().any()


def test_wrong_shapes_are_refused(best):
    with pytest.raises(EngineError, match="groups of 64"):
        PackedMatrix(best, "q4", 16, 100, group=64)
    with pytest.raises(EngineError):
        PackedMatrix(best, "q8", 16, 1 << 17, group=0)
    with pytest.raises(EngineError):
        PackedMatrix(best, "q8", 16, 100, group=0, rotated=True)
    with pytest.raises(EngineError):
        PackedMatrix(best, "bf13", 16, 96)
    mixed = PackedMatrix(best, "q4", 16, 128, group=64, rotated=True)
    codes, scales, biases = affine(16, 128, 64, 4, torch.float16)
    with pytest.raises(EngineError, match="fill"):
        mixed.fill_affine(pack_words(codes, 4), scales, biases, 4)
    narrow = PackedMatrix(best, "q6", 16, 128, group=64)
    with pytest.raises(EngineError, match="fill"):
        narrow.fill_affine(torch.zeros(16, 32, dtype=torch.int32), scales, biases, 8)
    packed = PackedMatrix(best, "q4", 16, 128, group=64)
    with pytest.raises(ValueError, match="rows have 64"):
        packed.fill(torch.zeros(16, 64))
    with pytest.raises(EngineError, match="out of range"):
        packed.fill(torch.zeros(16, 128), row=1)
    with pytest.raises(ValueError, match="must be"):
        packed.multiply(torch.zeros(2, 64))
    with pytest.raises(ValueError, match="do not fit"):
        packed.fill_affine(torch.zeros(16, 8, dtype=torch.int32), *torch.zeros(2, 16, 2), 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "bf13", "q4"])
def test_two_hundred_thousand_rows(best, kind):
    n = 200_000
    weight = torch.randn(n, 64)
    packed = PackedMatrix.dense(best, weight, kind)
    x = torch.randn(2, 64)
    want = x @ packed.rows(torch.arange(n), torch.float32).T
    close(packed.multiply(x), want, 0.02)
    rows = torch.randn(n, 64)
    few = PackedMatrix.dense(best, weight[:20], kind)
    out = few.multiply(rows)
    assert torch.equal(out[-5:], few.multiply(rows[-5:]))
