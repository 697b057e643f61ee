"""RMSNorm with a gradient by hand, beside the code to read and torch's own."""

from helpers.tests.builders import draw
from helpers.v3 import V3Config
from helpers.v3.norm import NormFunction, RMSNorm, rms_norm

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close


def norm_of(size, eps=1e-6):
    norm = RMSNorm(size, eps)
    nn.init.normal_(norm.weight)
    return norm


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    size=st.integers(1, 33),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_plain_lines(shape, size, scale, seed):
    torch.manual_seed(seed)
    norm = norm_of(size)
    x = (scale * torch.randn(*shape, size)).requires_grad_()
    grad = torch.randn(*shape, size)
    fast = norm(x)
    plain = rms_norm(x, norm.weight, norm.eps)
    assert_close(fast, plain)
    inputs = (x, norm.weight)
    found = torch.autograd.grad(fast, inputs, grad)
    wanted = torch.autograd.grad(plain, inputs, grad)
    # two terms that may cancel, each as large as this
    inverse = (x.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    term = (grad * norm.weight * inverse).abs().max().item()
    assert_close(found[0], wanted[0], rtol=1e-4, atol=2e-6 * term)
    assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)


def test_the_gradient_is_exact_in_a_slice_and_by_finite_differences():
    torch.manual_seed(0)
    weight = torch.randn(6, dtype=torch.float64)
    rows = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)

    def by_hand(rows, weight):
        return NormFunction.apply(rows[..., 2:8], weight, 1e-6)

    assert torch.autograd.gradcheck(by_hand, (rows, weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_torchs_own(dtype):
    norm = norm_of(8).to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    assert torch.equal(norm(x), nn.RMSNorm.forward(norm, x))


def test_a_model_says_the_same_to_the_bit_with_and_without_gradients():
    model = draw(V3Config.tiny()).eval()
    ids = torch.randint(1, 2048, (4, 33))
    with_gradients = model(ids)
    with torch.no_grad():
        assert torch.equal(model(ids), with_gradients)
    with torch.inference_mode():
        assert torch.equal(model(ids), with_gradients)
