"""Products with bias and activation in oneDNN equal the plain ones."""

import pytest
import torch

from opsin.kernels import Kernels, onednn

needed = pytest.mark.skipif(not onednn.is_supported(), reason="no bfloat16 in oneDNN here")


@needed
@pytest.mark.parametrize("activation", [*onednn.NAMES, "quick_gelu", "relu2"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [3, 64])
def test_linear_equals_the_plain_one(activation, with_bias, rows):
    torch.manual_seed(rows)
    x, weight = torch.randn(2, rows, 96).bfloat16(), (torch.randn(80, 96) * 0.1).bfloat16()
    bias = torch.randn(80).bfloat16() if with_bias else None
    wide = Kernels().linear(
        x.float(), weight.float(), None if bias is None else bias.float(), activation
    )
    with torch.inference_mode():
        got = onednn.OneDnnKernels().linear(x, weight, bias, activation)
    assert got.dtype == torch.bfloat16
    assert got.shape == wide.shape
    assert (got - wide).abs().max() <= 0.01 * wide.abs().max()


@needed
def test_other_types_are_left_to_torch():
    x, weight, bias = torch.randn(64, 32), torch.randn(16, 32), torch.randn(16)
    got = onednn.OneDnnKernels().linear(x, weight, bias, "relu")
    assert torch.equal(got, torch.nn.functional.linear(x, weight, bias).relu())
