"""Matrices filled from files hold what the same weights give from memory."""

from pathlib import Path

import pytest
import torch

from opsin.errors import EngineError
from opsin.kernels.cpu import Library, PackedMatrix
from opsin.kernels.cpu.matrix import Region
from opsin.quant.affine import dequantise, quantise
from opsin.quant.formats import Format
from opsin.quant.rotation import rotate


def whole(matrix: PackedMatrix) -> torch.Tensor:
    return matrix.rows(torch.arange(matrix.n), torch.float32)


@pytest.mark.parametrize("kind", ["bf16", "bf13", "q8", "q6", "q5", "q4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("first", "rows", "spread"), [(0, 75, 1), (5, 40, 1), (16, 40, 2)])
def test_a_file_gives_what_memory_gives(
    best: Library, tmp_path: Path, kind, dtype, first: int, rows: int, spread: int
):
    weight = torch.randn(rows, 192).to(dtype)
    (tmp_path / "weights").write_bytes(b"head" + weight.view(torch.uint8).numpy().tobytes())
    expected, got = (PackedMatrix(best, kind, 96, 192) for _ in range(2))
    expected.fill(weight, first, spread=spread)
    with (tmp_path / "weights").open("rb") as file:
        assert got.fill_file(file.fileno(), 4, rows, dtype, first, spread)
    assert torch.equal(whole(got), whole(expected))
    places = torch.arange(rows)
    places = first + places // 16 * 16 * spread + places % 16
    near = whole(got)[places] - weight.float()
    most = {"bf16": 0.02, "bf13": 0.02, "q8": 0.03, "q6": 0.12, "q5": 0.26, "q4": 0.6}
    assert near.abs().max() < most[kind]
    rest = torch.ones(96, dtype=torch.bool)
    rest[places] = False
    assert not whole(got)[rest].any(), "no other row was touched"


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("kind", "group", "scales"),
    [
        ("q4", 128, torch.float16),
        ("q4", 32, torch.float16),
        ("q4", 128, torch.uint8),
        ("q4", 32, torch.uint8),
        ("q5", 64, torch.float16),
        ("q5", 64, torch.uint8),
        ("q5", 32, torch.uint8),
        ("q6", 64, torch.float16),
        ("q6", 32, torch.uint8),
        ("q8", 64, torch.float16),
        ("q8", 0, torch.float16),
    ],
)
def test_quantising_finds_what_its_twin_finds(
    native: Library, kind, group: int, scales: torch.dtype, rotated: bool
):
    torch.manual_seed(group)
    weight = torch.randn(50, 128) * torch.rand(50, 1)
    weight[3] = 0.0
    weight[4] = 0.5
    form = Format(kind, group, scales, rotated)
    matrix = PackedMatrix.empty(native, form, 50, 128)
    matrix.fill(weight)
    ours, twins = whole(matrix), dequantise(*quantise(weight, form))
    twins = rotate(twins) if rotated else twins
    errors = [(values - weight).square().mean(dim=1) for values in (ours, twins)]
    assert (errors[0] <= errors[1] * 1.02 + 1e-7).all()
    assert (errors[1] <= errors[0] * 1.02 + 1e-7).all()
    if kind != "q8":
        kept = rotate(weight) if rotated else weight
        low, high = kept.unflatten(1, (-1, group)).aminmax(dim=2)
        step = (high.clamp_min(0) - low.clamp_max(0)) / {"q4": 15, "q5": 31, "q6": 63}[kind]
        plain = (step.square() / 12).mean(dim=1)
        assert (errors[0] <= plain * 1.1 + 1e-7).all(), "no worse than the range in equal steps"


def test_a_wide_matrix_and_odd_columns(best: Library, tmp_path: Path):
    for shape in ((33, 20001), (3000, 7)):
        weight = torch.randn(shape).bfloat16()
        (tmp_path / "weights").write_bytes(weight.view(torch.uint8).numpy().tobytes())
        matrix = PackedMatrix(best, "bf16", *shape)
        with (tmp_path / "weights").open("rb") as file:
            matrix.fill_file(file.fileno(), 0, shape[0], torch.bfloat16)
        assert torch.equal(matrix.rows(torch.arange(shape[0])), weight)


def test_a_file_that_ends_too_soon_is_an_error(best: Library, tmp_path: Path):
    (tmp_path / "weights").write_bytes(bytes(64 * 64 * 2 - 1))
    matrix = PackedMatrix(best, "bf16", 64, 64)
    with (tmp_path / "weights").open("rb") as file, pytest.raises(EngineError, match="fill"):
        matrix.fill_file(file.fileno(), 0, 64, torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "rotated"),
    [("bf13", False), ("q8", False), ("q6", True), ("q5", True), ("q4", False), ("q4", True)],
)
def test_a_view_of_packed_bytes_is_the_same_matrix(best: Library, kind, rotated: bool):
    matrix = PackedMatrix.dense(best, torch.randn(75, 192), kind, rotated=rotated)
    place = torch.empty(matrix.region_bytes + 64, dtype=torch.uint8)
    start = -place.data_ptr() % 64
    place[start : start + matrix.nbytes] = torch.frombuffer(matrix.memory(), dtype=torch.uint8)

    def view(num_bytes: int) -> PackedMatrix:
        region = Region(place, place.data_ptr() + start, num_bytes)
        return PackedMatrix.view(best, matrix.format, 75, 192, region)

    seen, x, bias = view(matrix.region_bytes), torch.randn(3, 192), torch.randn(75)
    assert torch.equal(whole(seen), whole(matrix))
    for each in (matrix, seen):
        each.fill_bias(bias)
    assert torch.equal(seen.multiply(x), matrix.multiply(x))
    with pytest.raises(EngineError, match="fill"):
        seen.fill(torch.zeros(75, 192))
    assert torch.equal(whole(seen), whole(matrix)), "a view is read only"
    with pytest.raises(EngineError, match="another size"):
        view(matrix.nbytes)


@pytest.mark.parametrize(("first", "rows", "spread"), [(0, 75, 1), (16, 32, 1), (16, 40, 2)])
def test_rows_read_where_they_lie_are_the_same_matrix(
    native: Library, first: int, rows: int, spread: int
):
    file = torch.randn(3 + rows * 192).bfloat16()
    weight = file[3:].view(rows, 192)  # as in a checkpoint, on no line of the cache
    copied, mapped = (PackedMatrix(native, "bf16", 96, 192) for _ in range(2))
    copied.fill(weight, first, spread=spread)
    assert mapped.map(weight, first, spread=spread)
    assert torch.equal(whole(mapped), whole(copied))
    for count in (1, 3, 16, 40, 70):
        x = torch.randn(count, 192)
        assert torch.equal(mapped.multiply(x), copied.multiply(x))
    x = torch.randn(5, 192)
    assert torch.equal(
        mapped.multiply(x, gated=True, activation="silu"),
        copied.multiply(x, gated=True, activation="silu"),
    )
    stored = file.clone()
    mapped.fill(torch.ones(8, 192), first)
    assert torch.equal(file, stored), "what was mapped is another's"
    kept = whole(copied)
    kept[first : first + 8] = 1
    assert torch.equal(whole(mapped), kept)


def test_what_cannot_be_read_in_place_is_known(best: Library):
    assert not PackedMatrix(best, "bf16", 32, 40).map(torch.zeros(32, 40).bfloat16())
    matrix = PackedMatrix(best, "bf16", 32, 64)
    assert not matrix.map(torch.zeros(16, 64).bfloat16(), 8)
    assert not matrix.map(torch.zeros(16, 64).half())
    assert not PackedMatrix(best, "q8", 32, 64).map(torch.zeros(32, 64).bfloat16())
    with pytest.raises(ValueError, match="one after another"):
        matrix.map(torch.zeros(16, 128).bfloat16()[:, :64])
    with pytest.raises(EngineError, match="map"):
        matrix.map(torch.zeros(48, 64).bfloat16())


def test_matrices_that_share_memory_come_and_go_alone(best: Library):
    weights = [torch.randn(40, 64).bfloat16() for _ in range(60)]
    matrices = [PackedMatrix.dense(best, weight) for weight in weights]
    large = PackedMatrix.dense(best, torch.ones(4096, 1024).bfloat16())
    del matrices[::2]
    fresh = [PackedMatrix(best, "bf16", 40, 64) for _ in range(60)]
    for matrix, weight in zip(matrices, weights[1::2], strict=True):
        assert torch.equal(matrix.rows(torch.arange(40)), weight)
    assert not any(whole(matrix).any() for matrix in fresh), "a new matrix is of zeros"
    del matrices, fresh
    assert bool((whole(large) == 1).all())
