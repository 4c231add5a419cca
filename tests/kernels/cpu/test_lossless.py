"""Bfloat16 in thirteen bits: the same weights, bit for bit, and the same products."""

import pytest
import torch

from opsin.errors import EngineError
from opsin.kernels.cpu import Library, PackedMatrix
from opsin.kernels.cpu.matrix import Region

SHAPES = [(16, 64), (40, 192), (1000, 576), (512, 2048), (64, 6144)]


def both(library: Library, weight: torch.Tensor) -> tuple[PackedMatrix, PackedMatrix]:
    """The same weights as they are, and packed."""
    return PackedMatrix.dense(library, weight), PackedMatrix.dense(library, weight, "bf13")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def kept(matrix: PackedMatrix) -> torch.Tensor:
    return matrix.rows(torch.arange(matrix.n))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_are_those_of_the_weights_as_they_are(native: Library, n: int, k: int):
    torch.manual_seed(n)
    weight = (torch.randn(n, k) * 0.02).bfloat16()
    plain, packed = both(native, weight)
    assert same_bits(kept(packed), weight)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32, 33, 64, 65, 130):
        x = torch.randn(rows, k)
        assert torch.equal(packed.multiply(x), plain.multiply(x))


def test_it_takes_thirteen_bits_a_weight(best: Library):
    plain, packed = both(best, (torch.randn(512, 2048) * 0.02).bfloat16())
    assert packed.nbytes < 0.82 * plain.nbytes


def test_values_of_every_kind_come_back(native: Library):
    """Zeros of both signs, subnormal numbers, infinities and NaN."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    weight = every.view(torch.bfloat16).view(512, 128)  # rows of few exponents each
    plain, packed = both(native, weight)
    assert packed.nbytes < plain.nbytes
    assert same_bits(kept(packed), kept(plain))
    plain, packed = both(native, weight.T.contiguous().view(512, 128))  # rows of all exponents
    assert same_bits(kept(packed), kept(plain))
    with pytest.raises(EngineError, match="not packed"):
        packed.memory()


def test_rows_of_too_many_exponents_lie_elsewhere(native: Library):
    torch.manual_seed(1)
    weight = (torch.randn(300, 128) * 0.02).bfloat16()
    weight[3, 5] = weight[299, 127] = 1e-30
    weight[20], weight[21, :64], weight[22, ::2] = 0, 0, -0.0
    plain, packed = both(native, weight)
    assert packed.nbytes < plain.nbytes
    assert same_bits(kept(packed), weight)
    for rows in (1, 3, 8, 20, 70):
        x = torch.randn(rows, 128)
        assert torch.equal(packed.multiply(x), plain.multiply(x))
    region = torch.zeros(packed.region_bytes + 64, dtype=torch.uint8)
    start = -region.data_ptr() % 64
    memory = torch.frombuffer(packed.memory(), dtype=torch.uint8)
    region[start : start + packed.nbytes] = memory
    place = Region(region, region.data_ptr() + start, packed.region_bytes)
    seen = PackedMatrix.view(native, packed.format, 300, 128, place)
    assert same_bits(kept(seen), weight)
    region[start + packed.nbytes - 2 * 256 - 300 * 208 :] = 0xFF  # numbers of rows that are none
    damaged = PackedMatrix.view(native, packed.format, 300, 128, place)
    assert damaged.multiply(torch.randn(2, 128)).shape == (2, 300), "any numbers, but no crash"


@pytest.mark.parametrize("spread", [1, 2])
def test_where_too_few_rows_can_be_packed_none_is(native: Library, spread: int):
    torch.manual_seed(2)
    weight = (torch.randn(96, 192) * 0.02).bfloat16()
    plain, packed = (PackedMatrix(native, kind, 192, 192) for kind in ("bf16", "bf13"))
    bias = torch.randn(192)
    for each in (plain, packed):
        each.fill(weight, 16, spread=spread)
        each.fill_bias(bias)
    weight[:, 7] = 1e-30
    for each in (plain, packed):
        each.fill(weight[:64], 16, spread=spread)
    assert packed.nbytes == plain.nbytes
    assert same_bits(kept(packed), kept(plain))
    for rows in (1, 5, 70):
        x = torch.randn(rows, 192)
        assert torch.equal(packed.multiply(x), plain.multiply(x))
