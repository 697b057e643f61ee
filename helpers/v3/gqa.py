"""Multi-head, grouped-query and multi-query attention: what V3 did not choose.

One class for all three, since they differ in one number: how many groups of heads have
keys and values of their own. Keys may be wider than values, as in V3. It takes the
place of `MLA` in a `Block` and is trained beside it in notebook 02.

Shapes: B sequences, T tokens, H hidden_size, h heads, g groups, d qk_dim, dv v_dim, dr
the part of a key that RoPE turns.
"""

from typing import NamedTuple

from helpers.checks import need
from helpers.v3.attention import LatentCache
from helpers.v3.rope import rotate

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GQAShape(NamedTuple):
    """The sizes of a layer. groups = heads is MHA, groups = 1 is MQA."""

    heads: int
    groups: int
    qk_dim: int  # of a query and a key
    v_dim: int
    rope_dim: int
    one_position_key: bool = False  # the turned part of a key is shared, as in MLA

    def in_keys(self) -> int:
        """Numbers of a token's keys, over all groups."""
        position_keys = 1 if self.one_position_key else self.groups
        content = self.groups * (self.qk_dim - self.rope_dim)
        return content + position_keys * self.rope_dim

    def cached(self) -> int:
        """Numbers kept per token: keys and values of all groups."""
        return self.in_keys() + self.groups * self.v_dim


class GQA(nn.Module):
    """Heads of a group share one key and one value per token (arXiv:2305.13245).

    RoPE turns the last `rope_dim` numbers of each query and key, as many as in MLA, so
    that both know positions equally well. Raises InputError for groups that do not
    divide the heads and a RoPE wider than a key.
    """

    def __init__(self, hidden_size: int, shape: GQAShape) -> None:
        super().__init__()
        h, g, d, dv, dr, _ = shape
        need(h % g == 0, "groups", g, f"it must divide heads={h}")
        need(dr <= d, "rope_dim", dr, f"a key has only {d} numbers")
        self.shape = shape
        self.q_proj = nn.Linear(hidden_size, h * d, bias=False)
        self.k_proj = nn.Linear(hidden_size, shape.in_keys(), bias=False)
        self.v_proj = nn.Linear(hidden_size, g * dv, bias=False)
        self.o_proj = nn.Linear(h * dv, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        cache: LatentCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x [B, T, H] -> [B, T, H]; rope [T, dr/2] are the turns of its positions.

        Without a cache only: it is compared in training. Raises InputError for one.
        """
        need(cache is None, "cache", cache, "only MLA decodes through one here")
        d = self.shape.qk_dim
        dv = self.shape.v_dim
        q = self._turned(self.q_proj(x).unflatten(-1, (-1, d)), rope)
        k = self._turned(self._keys(x), rope)
        # equal widths keep the fused kernel, as in MLA
        v = F.pad(self.v_proj(x).unflatten(-1, (-1, dv)), (0, d - dv))

        # every head gets a copy of its group's key and value
        per_group = self.shape.heads // self.shape.groups
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.repeat_interleave(per_group, dim=2).transpose(1, 2),
            v.repeat_interleave(per_group, dim=2).transpose(1, 2),
            is_causal=True,
        )
        return self.o_proj(out.transpose(1, 2)[..., :dv].flatten(2))

    def _keys(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> keys [B, T, g, d], not yet turned."""
        _, g, d, _, dr, one_position_key = self.shape
        k = self.k_proj(x)
        if not one_position_key:
            return k.unflatten(-1, (g, d))
        content, position = k.split((g * (d - dr), dr), dim=-1)
        position = position.unsqueeze(2).expand(-1, -1, g, -1)
        return torch.cat((content.unflatten(-1, (g, d - dr)), position), dim=-1)

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        """x [B, T, heads, d] with its last dr numbers turned."""
        dr = self.shape.rope_dim
        still, to_turn = x.split((self.shape.qk_dim - dr, dr), dim=-1)
        return torch.cat((still, rotate(to_turn, rope.unsqueeze(-2))), dim=-1)
