"""Norms, rotation, activations and the sampling helpers equal plain torch."""

import pytest
import torch
from torch.nn import functional as F

from opsin.kernels.interface import Kernels

PLAIN = Kernels()
KINDS = ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]


@pytest.mark.parametrize("dim", [16, 100, 1031])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_norms(native, rows, dim):
    x, residual = torch.randn(2, rows, dim)
    weight, bias = torch.randn(2, dim)
    normed, same = native.rms_norm(x, weight, 1e-6)
    assert same is x
    assert torch.allclose(normed, PLAIN.rms_norm(x, weight, 1e-6), atol=1e-5)
    normed, summed = native.layer_norm(x, weight, bias, 1e-5, residual)
    assert torch.equal(summed, x + residual)
    assert torch.allclose(normed, F.layer_norm(summed, (dim,), weight, bias, 1e-5), atol=1e-5)


def test_norm_of_bfloat16_is_rounded_once(native):
    x, residual = torch.randn(2, 4, 96).bfloat16()
    normed, summed = native.rms_norm(x, None, 1e-6, residual)
    assert torch.equal(summed, x + residual)
    want = F.rms_norm(summed.float(), (96,), None, 1e-6)
    assert torch.allclose(normed.float(), want, atol=0, rtol=2**-8)


@pytest.mark.parametrize("kind", KINDS)
def test_activations(native, kind):
    x = torch.cat((torch.linspace(-30, 30, 1001), torch.tensor([0.0, -100.0, 100.0, 1e-8])))
    up = torch.randn_like(x)
    want = PLAIN.activation(x.double(), kind).float()
    assert torch.allclose(native.activate(x, None, kind), want, atol=2e-6, rtol=2e-6)
    assert torch.allclose(native.activate(x, up, kind), want * up, atol=5e-6, rtol=5e-6)
    half = native.activate(x.bfloat16(), None, kind).float()
    assert torch.allclose(half, PLAIN.activation(x.bfloat16().float(), kind), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 80), (96, 24)])
@pytest.mark.parametrize("pairs", ["half", "adjacent"])
def test_rope(native, dim, rotary, pairs):
    x = torch.randn(5, 3, dim)
    angle = torch.randn(5, rotary // 2)
    want = PLAIN.rope(x, angle.cos(), angle.sin(), pairs)
    got = native.rope_(x.clone(), angle.cos(), angle.sin(), interleaved=pairs == "adjacent")
    assert torch.allclose(got, want, atol=1e-6)
    half = native.rope_(x.bfloat16(), angle.cos(), angle.sin(), interleaved=pairs == "adjacent")
    plain = PLAIN.rope(x.bfloat16(), angle.cos(), angle.sin(), pairs)
    assert torch.allclose(half.float(), plain.float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("n", [1, 15, 16, 257, 5000])
def test_argmax_is_numpys_with_ties_infinities_and_nans(native, n):
    for odd in (-torch.inf, torch.inf, torch.nan, -torch.nan, 0.0, -0.0):
        for fill in (torch.randn(n), torch.full((n,), -torch.inf), torch.zeros(n)):
            logits = fill.clone()
            logits[n // 3] = logits[2 * n // 3] = logits[n - 1] = odd
            assert native.argmax(logits) == int(logits.numpy().argmax())


@pytest.mark.parametrize("n", [1, 15, 16, 49_280])
def test_sampling_helpers(native, n):
    logits = torch.randn(n) * 5
    assert native.argmax(logits) == int(logits.argmax())
    assert native.argmax(torch.ones(n)) == 0
    probabilities, total = native.softmax(logits, 0.7)
    assert torch.allclose(probabilities, (logits / 0.7).softmax(0), atol=1e-6)
    assert total == pytest.approx(float((logits / 0.7).logsumexp(0)), rel=1e-5)
    logits[n // 2] = -torch.inf
    if n > 1:
        assert native.softmax(logits)[0][n // 2] == 0
