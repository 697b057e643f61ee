"""FP8 as DeepSeek-V3 trains with it (V3 section 3.3): formats, scales, products.

`convert(model, recipe)` swaps the modules whose products are rounded; the model itself
knows nothing of FP8. A CPU has no fast FP8 product, so operands are rounded to FP8,
scaled back, and multiplied in float32: what a GPU computes that adds up in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from helpers.checks import need
from helpers.v3.attention import MLA
from helpers.v3.experts import MLP, Experts
from helpers.v3.grouped import Product, grouped_linear
from helpers.v3.model import DeepSeekV3

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows and columns that share a scale; None stands for all there are.
BlockSize = tuple[int | None, int | None]


class Format(NamedTuple):
    """A small floating-point format. `dtype` is torch's, None where torch has none."""

    dtype: torch.dtype | None
    largest: float
    mantissa_bits: int
    smallest_exponent: int  # of a normal number


FORMATS = {
    "e4m3": Format(torch.float8_e4m3fn, 448.0, 3, -6),
    "e5m2": Format(torch.float8_e5m2, 57344.0, 2, -14),
    # V3 only names E5M6: that its top exponent is reserved is our reading
    "e5m6": Format(None, 65024.0, 6, -14),
}


def cast(x: Tensor, fmt: str = "e4m3") -> Tensor:
    """x to the nearest value of `fmt`, ties to even, at most its largest; NaN stays.

    -> float8 codes, or float32 for e5m6, which torch lacks.
    """
    need(fmt in FORMATS, "fmt", fmt, f"use one of {', '.join(FORMATS)}")
    dtype, largest, mantissa_bits, smallest_exponent = FORMATS[fmt]
    x = x.float().clamp(-largest, largest)
    if dtype is not None:
        return x.to(dtype)
    exponent = (torch.frexp(x).exponent - 1).clamp(min=smallest_exponent)
    step = torch.exp2(exponent - mantissa_bits)  # between neighbouring values
    return (x / step).round() * step


class _Grid(NamedTuple):
    """A matrix [..., R, C] cut into blocks [..., R/r, r, C/c, c], and the way back."""

    blocks: Tensor
    rows: int
    columns: int

    def whole(self, blocks: Tensor) -> Tensor:
        """Blocks of this grid as a matrix again, without what was added at the edge."""
        joined = blocks.flatten(-2).flatten(-3, -2)
        return joined[..., : self.rows, : self.columns]


def _cut(x: Tensor, block: BlockSize) -> _Grid:
    """Cut x [..., R, C] into blocks, with zeros added where the last are ragged."""
    sizes_fit = len(block) == 2 and all(
        size is None or (type(size) is int and size > 0) for size in block
    )
    if x.dim() < 2 or not sizes_fit:
        raise ValueError(
            f"block={block!r} must be two whole numbers above 0 (None: all), for a "
            f"tensor of 2 or more dimensions, not {x.dim()}"
        )
    R, C = x.shape[-2:]
    r = block[0] or max(R, 1)
    c = block[1] or max(C, 1)
    missing_rows = -R % r
    missing_columns = -C % c
    if missing_rows or missing_columns:
        x = F.pad(x, (0, missing_columns, 0, missing_rows))
    blocks = x.reshape(*x.shape[:-2], x.shape[-2] // r, r, x.shape[-1] // c, c)
    return _Grid(blocks, R, C)


def quantise(
    x: Tensor,
    block: BlockSize = (1, 128),
    fmt: str = "e4m3",
    pow2: bool = False,
    low: float = 1e-12,
    high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """x [..., R, C] is about codes * scale: codes of its shape, a scale for each block.

    scale [..., ceil(R/r), ceil(C/c)] = largest |x| of the block, kept within `low` and
    `high`, over the largest value of `fmt`; `pow2` rounds it up to a power of two. What
    lies below half the smallest code becomes 0, what lies above `high` saturates. A
    block with an infinity or a NaN is NaN as a whole when it is scaled back.
    """
    need(fmt in FORMATS, "fmt", fmt, f"use one of {', '.join(FORMATS)}")
    grid = _cut(x.float(), block)
    largest = grid.blocks.abs().amax(dim=(-3, -1)).clamp(low, high)
    scale = largest / FORMATS[fmt].largest
    if pow2:
        scale = _up_to_power_of_two(scale)
    codes = cast(grid.blocks / scale[..., :, None, :, None], fmt)
    return grid.whole(codes), scale


def _up_to_power_of_two(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    # 0.5 is a power of two already; anything above it goes up to 1
    rounded = torch.where(mantissa == 0.5, mantissa, mantissa.ceil())
    return torch.ldexp(rounded, exponent)


def dequantise(codes: Tensor, scale: Tensor, block: BlockSize = (1, 128)) -> Tensor:
    """codes [..., R, C] times the scale of their block, in float32.

    Raises ValueError for scales whose shape does not fit.
    """
    grid = _cut(codes.float(), block)
    expected = (*grid.blocks.shape[:-3], grid.blocks.shape[-2])
    if scale.shape != expected:
        raise ValueError(
            f"scales of shape {list(scale.shape)} do not fit codes {list(codes.shape)} "
            f"in blocks {block}: it must be {list(expected)}"
        )
    return grid.whole(grid.blocks * scale[..., :, None, :, None])


@dataclass(frozen=True)
class Rounding:
    """What is done to one operand: `rounding(x)` is x rounded, in float32.

    The formats "bf16" and "float32" need no scales.
    """

    block: BlockSize = (1, 128)
    fmt: str = "e4m3"
    pow2: bool = False
    high: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.fmt == "float32":
            return x.float()
        if self.fmt == "bf16":
            return x.bfloat16().float()
        codes, scale = quantise(x, self.block, self.fmt, self.pow2, high=self.high)
        return dequantise(codes, scale, self.block)


@dataclass(frozen=True)
class Recipe:
    """How the three products of a linear layer round their operands. Default: V3's.

    Not rounded are embedding, head, gate, norms, attention, MTP's eh_proj (BF16 in the
    published files), sums and outputs.
    """

    # Fprop: y = x w^T
    x: Rounding = Rounding((1, 128))  # tiles along channels
    w: Rounding = Rounding((128, 128))
    # Dgrad: dx = g w
    g: Rounding = Rounding((1, 128))  # tiles along channels
    # Wgrad: dw = g^T x, tiles along tokens. x is what Fprop saw, or its `cache`
    x_back: Rounding = Rounding((128, 1))
    g_back: Rounding = Rounding((128, 1))
    cache: Rounding | None = None

    def pow2(self, *names: str) -> "Recipe":
        """A copy whose operands `names` have powers of two for scales."""
        changed = {name: replace(getattr(self, name), pow2=True) for name in names}
        return replace(self, **changed)

    def after_attention(self) -> "Recipe":
        """The copy for o_proj (V3 section 3.3.3).

        Its input has powers of two for scales and is kept for the backward pass in
        E5M6.
        """
        copy = self.pow2("x", "x_back")
        if self.x.fmt not in FORMATS:
            return replace(copy, cache=None)
        return replace(copy, cache=replace(self.x, fmt="e5m6", pow2=True))

    def linear(self, x: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
        """x [..., in] times weight [out, in] -> [..., out], operands rounded.

        With `ends` it is `grouped.grouped_linear`: weight [E, out, in].
        """
        flat = x.flatten(0, -2)
        out = RoundedProduct.apply(flat, weight, ends, self)
        return out.unflatten(0, x.shape[:-1])


class RoundedProduct(torch.autograd.Function):
    """x [rows, in] times weight [out, in], or [E, out, in] with the rows' `ends`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ends: Tensor | None, recipe: Recipe
    ) -> Tensor:
        seen = recipe.x(x)
        w = recipe.w(weight)
        kept = seen
        if recipe.cache is not None:
            kept = recipe.cache(x)
        ctx.save_for_backward(kept, w, ends)
        ctx.recipe = recipe
        if ends is None:
            return F.linear(seen, w)
        return grouped_linear(seen, w, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, w, ends = ctx.saved_tensors
        recipe = ctx.recipe
        if ends is None:
            dgrad = recipe.g(grad) @ w
            wgrad = recipe.g_back(grad).T @ recipe.x_back(x)
            return dgrad, wgrad, None, None

        # expert by expert, so that no tile holds the tokens of two
        borders = ends[:-1].tolist()
        dgrads = []
        wgrads = []
        for expert, g, rows in zip(
            w, grad.tensor_split(borders), x.tensor_split(borders), strict=True
        ):
            dgrads.append(recipe.g(g) @ expert)
            wgrads.append(recipe.g_back(g).T @ recipe.x_back(rows))
        return torch.cat(dgrads), torch.stack(wgrads), None, None


# --------------------------------------------------------------- modules to swap in


class RoundedLinear(nn.Linear):
    """A linear layer whose three products round their operands."""

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        # on the meta device: the weight is taken over, none is drawn
        super().__init__(
            linear.in_features, linear.out_features, bias=False, device="meta"
        )
        self.weight = linear.weight
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.recipe.linear(x, self.weight)


class RoundedMLA(MLA):
    """Latent attention whose absorbed form multiplies by the rounded kv_b_proj."""

    kv_b_proj: RoundedLinear

    def up_weight(self) -> Tensor:
        """kv_b_proj as its product sees it."""
        return self.kv_b_proj.recipe.w(self.kv_b_proj.weight)


def _expert_products(recipe: Recipe) -> tuple[Product, Product]:
    """What is sent to the experts, and the gradient that is, have powers of two.

    The scales of both are cheap to apply then (V3 section 3.3.3).
    """
    return recipe.pow2("x").linear, recipe.pow2("g").linear


# what a layer of this name gets, None where it stays as it is
ByName = Callable[[str], Recipe | None]


def convert(model: DeepSeekV3, recipe: Recipe | ByName) -> DeepSeekV3:
    """Change `model` so that its products round their operands; -> the same model.

    Its parameters, their names and their order stay. Rounded are the linear layers of
    attention and feed-forwards and the routed experts: what the published files hold
    in FP8. A function gives each layer its own recipe by its name, for instance
    "layers.1.self_attn.o_proj" or "layers.1.mlp.experts".
    """
    by_name = _everywhere(recipe) if isinstance(recipe, Recipe) else recipe
    for name, module in list(model.named_modules()):
        if isinstance(module, MLA | MLP):
            _round_linears(name, module, by_name)
        if isinstance(module, MLA) and isinstance(module.kv_b_proj, RoundedLinear):
            module.__class__ = RoundedMLA  # the same layer, one method another
        if isinstance(module, Experts):
            own = by_name(name)
            if own is not None:
                module.products = _expert_products(own)
    return model


def _everywhere(recipe: Recipe) -> ByName:
    """V3's rule: one recipe, with powers of two after attention."""

    def by_name(name: str) -> Recipe:
        return recipe.after_attention() if name.endswith("o_proj") else recipe

    return by_name


def _round_linears(prefix: str, parent: nn.Module, by_name: ByName) -> None:
    for name, layer in list(parent.named_children()):
        if not isinstance(layer, nn.Linear):
            continue
        own = by_name(f"{prefix}.{name}")
        if own is not None:
            setattr(parent, name, RoundedLinear(layer, own))


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe that `model` was converted with, None where it was not."""
    for name, module in model.named_modules():
        if isinstance(module, RoundedLinear) and not name.endswith("o_proj"):
            return module.recipe
    return None


def round_moments(optimizer: torch.optim.Optimizer) -> None:
    """Round AdamW's moments to BF16 numbers, as V3 keeps them (section 3.3.3).

    The tensors that hold them stay float32.
    """
    for state in optimizer.state.values():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment].copy_(state[moment].bfloat16())
