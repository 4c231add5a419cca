"""Products on the native kernels equal the plain ones, at every instruction set of this machine."""

from typing import get_args

import pytest
import torch

from opsin import kernels
from opsin.kernels import Activation, Kernels, onednn
from opsin.kernels.native import BETTER_IN_ONEDNN, LEAST_WEIGHTS, NativeKernels


@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(203, 720, 1056), (64, 320, 96), (9, 200, 147), (1, 320, 96), (0, 320, 96)]
)
def test_linear_equals_the_plain_one(native, activation, with_bias, shape):
    rows, n, k = shape
    torch.manual_seed(rows)
    x, weight = torch.randn(2, rows, k).bfloat16(), (torch.randn(n, k) * 0.1).bfloat16()
    bias = torch.randn(n).bfloat16() if with_bias else None
    wide = Kernels().linear(
        x.float(), weight.float(), None if bias is None else bias.float(), activation
    )
    got = NativeKernels(native).linear(x, weight, bias, activation)
    assert got.dtype == torch.bfloat16
    assert got.shape == wide.shape
    if rows:
        assert (got - wide).abs().max() <= 0.01 * wide.abs().max()
    if rows and NativeKernels(native).products is None:
        alone = NativeKernels(native).linear(x[:, :1], weight, bias, activation)
        assert torch.equal(alone, got[:, :1]), "whatever rows are beside it"


def test_weights_that_do_not_lie_together_are_read_all_the_same(native):
    x, weight = torch.randn(16, 128).bfloat16(), torch.randn(128, 512).bfloat16()
    got = NativeKernels(native).linear(x, weight.T, None)
    assert torch.equal(got, NativeKernels(native).linear(x, weight.T.contiguous(), None))


def test_other_types_and_small_products_are_left_to_torch(native):
    for dtype, n in ((torch.float32, 512), (torch.bfloat16, 16)):
        x, weight = torch.randn(64, 96).to(dtype), torch.randn(n, 96).to(dtype)
        assert n * 96 < LEAST_WEIGHTS or dtype == torch.float32
        got = NativeKernels(native).linear(x, weight, None, "relu")
        assert torch.equal(got, Kernels().linear(x, weight, None, "relu"))


def test_experts_share_the_products(native):
    x, weight = torch.randn(12, 128).bfloat16(), torch.randn(3, 256, 128).bfloat16()
    ids = torch.tensor([0] * 5 + [2] * 7)
    got = NativeKernels(native).expert_linear(x, weight, ids)
    each = [NativeKernels(native).linear(x[i : i + 1], weight[e], None) for i, e in enumerate(ids)]
    assert torch.equal(got, torch.cat(each))


def test_products_are_onednn_s_where_those_are_faster(native):
    taken = NativeKernels(native).products
    assert (taken is not None) == (native.isa in BETTER_IN_ONEDNN and onednn.is_supported())


def test_kernels_are_native_where_there_is_a_library(native):
    place = torch.device("cpu")
    assert isinstance(kernels.select(place, native), NativeKernels)
    assert type(kernels.select(torch.device("meta"), native)) is Kernels
    plain = onednn.OneDnnKernels if onednn.is_supported() else Kernels
    assert type(kernels.select(place)) is plain
