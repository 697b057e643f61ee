"""FP8 as DeepSeek-V3 trains with it (arXiv:2412.19437, section 3.3): formats, scales by block, products whose operands are rounded.

A CPU has no fast FP8 product: operands are rounded to FP8, scaled back and multiplied in float32, as a GPU would that adds up in float32.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.model import grouped_linear

Block = tuple[int | None, int | None]  # rows and columns that share a scale; None: all there are
# torch's dtype, largest value, mantissa bits, smallest normal exponent. V3 only names E5M6: that its top exponent is reserved is our reading
FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0, 3, -6), "e5m2": (torch.float8_e5m2, 57344.0, 2, -14), "e5m6": (None, 65024.0, 6, -14)}


def cast(x: Tensor, fmt: str = "e4m3") -> Tensor:
    """x to the nearest value of `fmt`, ties to even, at most its largest; NaN stays. float8 codes, or float32 for e5m6, which torch lacks."""
    if fmt not in FORMATS:
        raise ValueError(f"fmt={fmt!r} is not known: use one of {', '.join(FORMATS)}")
    dtype, largest, bits, smallest = FORMATS[fmt]
    x = x.float().clamp(-largest, largest)
    if dtype is not None:
        return x.to(dtype)
    step = torch.exp2((torch.frexp(x).exponent - 1).clamp(min=smallest) - bits)  # between neighbouring values
    return (x / step).round() * step


def _blocks(x: Tensor, block: Block) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x [..., R, C] -> [..., R/r, r, C/c, c], with zeros added below and to the right where a block is ragged, and the way back."""
    if x.dim() < 2 or len(block) != 2 or not all(n is None or (type(n) is int and n > 0) for n in block):
        raise ValueError(f"block={block!r} must be two whole numbers above 0 (None: all), for a tensor of 2 or more dimensions, not {x.dim()}")
    R, C = x.shape[-2:]
    r, c = block[0] or max(R, 1), block[1] or max(C, 1)
    x = F.pad(x, (0, -C % c, 0, -R % r)) if R % r or C % c else x
    return x.reshape(*x.shape[:-2], -(-R // r), r, -(-C // c), c), lambda blocks: blocks.flatten(-2).flatten(-3, -2)[..., :R, :C]


def quantise(x: Tensor, block: Block = (1, 128), fmt: str = "e4m3", pow2: bool = False, low: float = 1e-12,
             high: float | None = None) -> tuple[Tensor, Tensor]:
    """x [..., R, C] -> codes of that shape and float32 scales [..., ceil(R/r), ceil(C/c)]: x is about codes * scale.

    scale = largest |x| of the block, kept within `low` and `high`, / largest value of `fmt`; `pow2` rounds it up to a power of two. What is below
    half the smallest code becomes 0, what is above `high` saturates. A block with an infinity or a NaN is NaN as a whole when scaled back.
    """
    blocks, back = _blocks(x.float(), block)
    scale = blocks.abs().amax(dim=(-3, -1)).clamp(low, high) / cast(x.new_tensor(torch.inf), fmt).float()
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    scale = torch.ldexp(torch.where(mantissa == 0.5, mantissa, mantissa.ceil()), exponent) if pow2 else scale
    return back(cast(blocks / scale[..., :, None, :, None], fmt)), scale


def dequantise(codes: Tensor, scale: Tensor, block: Block = (1, 128)) -> Tensor:
    """codes * scale of their block, in float32. ValueError for a scale grid of another shape."""
    blocks, back = _blocks(codes.float(), block)
    grid = (*blocks.shape[:-3], blocks.shape[-2])
    if scale.shape != grid:
        raise ValueError(f"scales of shape {list(scale.shape)} do not fit codes {list(codes.shape)} in blocks {block}: it must be {list(grid)}")
    return back(blocks * scale[..., :, None, :, None])


@dataclass(frozen=True)
class Rounding:
    """What is done to one operand: `rounding(x)` is x rounded, in float32. fmt "bf16" and "float32" need no scales."""

    block: Block = (1, 128)
    fmt: str = "e4m3"
    pow2: bool = False
    high: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.fmt in ("bf16", "float32"):
            return (x.bfloat16() if self.fmt == "bf16" else x).float()
        return dequantise(*quantise(x, self.block, self.fmt, self.pow2, high=self.high), self.block)


@dataclass(frozen=True)
class Recipe:
    """How the three products of a linear layer round their operands; the default is V3's. `DeepSeekV3(config, recipe)` computes with it.

    Not rounded: embedding, head, gate, norms, attention, MTP's eh_proj (BF16 in the published files), sums and outputs.
    """

    x: Rounding = Rounding((1, 128))  # input in Fprop: tiles along channels
    w: Rounding = Rounding((128, 128))  # weight in Fprop and Dgrad
    g: Rounding = Rounding((1, 128))  # gradient in Dgrad: tiles along channels
    x_back: Rounding = Rounding((128, 1))  # input in Wgrad, tiles along tokens: what Fprop saw, or its `cache`, rounded again
    g_back: Rounding = Rounding((128, 1))  # gradient in Wgrad: tiles along tokens
    cache: Rounding | None = None

    def pow2(self, *names: str) -> "Recipe":
        """A copy whose operands `names` have powers of two for scales."""
        return replace(self, **{name: replace(getattr(self, name), pow2=True) for name in names})

    def after_attention(self) -> "Recipe":
        """For o_proj (V3 section 3.3.3): powers of two as scales of the input, which is kept for the backward pass in E5M6."""
        return replace(self.pow2("x", "x_back"), cache=replace(self.x, fmt="e5m6", pow2=True) if self.x.fmt in FORMATS else None)

    def linear(self, x: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
        """x [..., in], weight [out, in] -> [..., out]; with `ends` a `grouped_linear`."""
        return _Product.apply(x.flatten(0, -2), weight, ends, self).unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """x [N, in] times weight [out, in], or [E, out, in] with the rows' `ends`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor | None, recipe: Recipe) -> Tensor:
        seen, w, ctx.recipe = recipe.x(x), recipe.w(weight), recipe
        ctx.save_for_backward(recipe.cache(x) if recipe.cache else seen, w, ends)
        return F.linear(seen, w) if ends is None else grouped_linear(seen, w, ends)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, w, ends), recipe = ctx.saved_tensors, ctx.recipe
        if ends is None:
            return recipe.g(grad) @ w, recipe.g_back(grad).T @ recipe.x_back(x), None, None
        parts = zip(*(t.tensor_split(ends[:-1].tolist()) for t in (grad, x)), w, strict=True)  # by expert: no tile holds the tokens of two
        dx, dw = zip(*((recipe.g(g) @ e, recipe.g_back(g).T @ recipe.x_back(rows)) for g, rows, e in parts), strict=True)
        return torch.cat(dx), torch.stack(dw), None, None
