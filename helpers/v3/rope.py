"""Positions: decoupled RoPE, stretched by YaRN (V3 sections 2.1.1 and 4.3)."""

import math
from collections.abc import Mapping
from typing import Any

from helpers.v3.config import V3Config

import torch
from torch import Tensor


def rope_frequencies(config: V3Config) -> tuple[Tensor, float, float]:
    """Inverse frequencies [qk_rope_head_dim / 2], factor on cos and sin, softmax scale.

    YaRN (arXiv:2309.00071) divides the frequencies of slow dimensions by `factor`,
    keeps those of fast ones, and ramps between the two. The attention logits are
    multiplied by (0.1 * mscale_all_dim * ln(factor) + 1)^2, which is 1.3689^2 in the
    671B model (V3 section 4.3).
    """
    dim = config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    # on the CPU by name: a model built on the meta device still has its frequencies
    frequencies = 1.0 / config.rope_theta**exponents
    softmax_scale = (config.qk_nope_head_dim + dim) ** -0.5
    if config.rope_scaling is None:
        return frequencies, 1.0, softmax_scale

    scaling = config.rope_scaling
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or config.max_position_embeddings / original
    ramp = _ramp(config, original, scaling)
    frequencies = frequencies * (1 - ramp) + frequencies / factor * ramp

    whole = scaling.get("mscale_all_dim")
    if whole:
        softmax_scale *= _mscale(factor, whole) ** 2
    return frequencies, _turn_scale(factor, scaling), softmax_scale


def _ramp(config: V3Config, original: float, scaling: Mapping[str, Any]) -> Tensor:
    """0 where a dimension keeps its frequency, 1 where it is divided by the factor."""
    dim = config.qk_rope_head_dim

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns over the original context."""
        wavelength = original / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow") or 1)), dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low
    return (steps / (high - low or 0.001)).clamp(0, 1)


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature: 0.1 * weight * ln(factor) + 1."""
    if factor <= 1:
        return 1.0
    return 0.1 * weight * math.log(factor) + 1.0


def _turn_scale(factor: float, scaling: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by; 1 where mscale equals mscale_all_dim."""
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    part = scaling.get("mscale")
    whole = scaling.get("mscale_all_dim")
    if part and whole:
        return _mscale(factor, part) / _mscale(factor, whole)
    return _mscale(factor, 1.0)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Interleaved RoPE: turn the pairs (x0, x1), (x2, x3), ... of x [..., dr].

    Each pair is read as a complex number; `turn` [..., dr/2] multiplies it.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
