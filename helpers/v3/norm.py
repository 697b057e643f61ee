"""RMSNorm: a vector divided by the root mean square of its entries.

`rms_norm` is the code to read, `RMSNorm` the same with a gradient written by hand. On
a CPU torch's own is a chain of small kernels forward and a longer one backward; a
training step of a small model spent a fifth of its time there.

Shapes: x [..., H].
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: [..., H] -> [..., H]."""
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms [..., H] and 1 / rms [..., 1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = (length.square() / x.shape[-1] + eps).rsqrt()
    return x * inverse, inverse


class NormFunction(torch.autograd.Function):
    """Keeps the normalised rows and 1 / rms, all that the gradient needs.

    With n = x / rms and g the gradient of n * weight:
    d weight = sum over rows of g * n
    d x = (g * weight - n * mean(g * weight * n)) / rms
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normalise(x, eps)
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inverse, weight = ctx.saved_tensors
        H = weight.shape[0]
        product = grad * normed
        grad_weight = product.reshape(-1, H).sum(dim=0)
        along = (product @ weight).unsqueeze(-1) / -H
        grad_x = torch.addcmul(grad * weight, normed, along).mul_(inverse)
        return grad_x, grad_weight, None


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` of one dimension with a faster gradient in float32 on a CPU."""

    eps: float

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        single = x.dtype == self.weight.dtype == torch.float32
        if not single or x.device.type != "cpu":
            return super().forward(x)
        if torch.is_grad_enabled():
            return NormFunction.apply(x, self.weight, self.eps)
        # the same bits without a gradient
        return _normalise(x, self.eps)[0] * self.weight
