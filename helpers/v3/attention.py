"""Multi-head latent attention (V3 section 2.1.1) and the cache that it makes small.

Shapes: B sequences, T new tokens, S tokens that can be seen, H hidden_size, h heads,
c = kv_lora_rank, and per head dn = qk_nope_head_dim, dr = qk_rope_head_dim,
dv = v_head_dim.
"""

from helpers.v3.config import V3Config
from helpers.v3.norm import RMSNorm
from helpers.v3.rope import rope_frequencies, rotate

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LatentCache:
    """What decoding remembers: per layer and token c + dr numbers, nothing else.

    Those are the kv latent and the rotated key that all heads share. `rows` has a
    tensor [B, max_len, c + dr] for each layer, allocated once; the first `length`
    tokens are filled. Bytes per token: layers * (c + dr) * itemsize.

    `pad` [B] says how many leading tokens of each row are padding, so that prompts of
    different lengths end in the same column; None where no row has any.
    """

    def __init__(
        self,
        config: V3Config,
        layers: int,
        batch: int,
        max_len: int,
        like: Tensor,
        pad: Tensor | None = None,
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (batch, max_len, width)
        self.rows = [
            torch.zeros(shape, dtype=like.dtype, device=like.device)
            for _ in range(layers)
        ]
        self.length = 0
        self.pad = pad

    def keep(self, alive: Tensor) -> None:
        """Keep the sequences `alive` (indices), drop the others."""
        self.rows = [rows.index_select(0, alive) for rows in self.rows]
        if self.pad is not None:
            self.pad = self.pad[alive]

    def visible(self, new: int) -> Tensor | None:
        """Which of the S = length + new tokens each of the `new` last ones may see.

        Booleans [1 or B, new, S]. None where a mask would say nothing: the text starts
        here, so plain causal attention is right, or a single token sees all.
        """
        seen = self.length + new
        if self.pad is None and (self.length == 0 or new == 1):
            return None
        device = self.rows[0].device
        causal = torch.ones(new, seen, dtype=torch.bool, device=device)
        causal = causal.tril(self.length)
        if self.pad is None:
            return causal.unsqueeze(0)
        real = torch.arange(seen, device=device) >= self.pad[:, None]
        # a token of the padding sees itself: a row that sees nothing would be NaN
        own = causal.triu(self.length)
        return causal & real.unsqueeze(1) | own

    @property
    def nbytes(self) -> int:
        """Bytes that the filled part takes."""
        return sum(
            rows[:, : self.length].numel() * rows.element_size() for rows in self.rows
        )


class MLA(nn.Module):
    """Keys and values of all heads from one small latent per token (V3 eq. 1-11)."""

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.config = config
        H = config.hidden_size
        h = config.num_attention_heads
        dn = config.qk_nope_head_dim
        dr = config.qk_rope_head_dim
        dv = config.v_head_dim
        c = config.kv_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(H, h * (dn + dr), bias=False)
        else:
            self.q_a_proj = nn.Linear(H, config.q_lora_rank, bias=False)
            # the published code fixes eps to 1e-6 for both latents
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, h * (dn + dr), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(H, c + dr, bias=False)
        self.kv_a_layernorm = RMSNorm(c, eps=1e-6)
        self.kv_b_proj = nn.Linear(c, h * (dn + dv), bias=False)
        self.o_proj = nn.Linear(h * dv, H, bias=False)
        self.softmax_scale = rope_frequencies(config)[2]

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        cache: LatentCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x [B, T, H] -> [B, T, H]; rope [T, dr/2] are the turns of its positions.

        With a cache the T tokens come after the `cache.length` that it holds, and
        their latents are written to it.
        """
        q_nope, q_rope, latent = self.project(x, rope)
        if cache is None:
            out = self.naive(q_nope, q_rope, latent)
            return self.o_proj(out.flatten(-2))

        T = x.shape[1]
        end = cache.length + T
        cache.rows[layer][:, cache.length : end] = latent
        mask = cache.visible(T)
        if cache.length == 0:
            # a whole prompt: keys and values once each, then a fused kernel
            out = self.naive(q_nope, q_rope, latent, mask)
        else:
            seen = cache.rows[layer][:, :end]
            out = self.absorbed(q_nope, q_rope, seen, mask)
        return self.o_proj(out.flatten(-2))

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and latents of x [B, T, H], rotated by rope [T, dr/2].

        -> q_nope [B, T, h, dn], q_rope [B, T, h, dr], latent [B, T, c + dr]. The
        latent is all that is cached.
        """
        config = self.config
        h = config.num_attention_heads
        widths = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        q = self._queries(x).unflatten(-1, (h, -1))
        q_nope, q_rope = q.split(widths, dim=-1)

        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        kv, k_rope = self.kv_a_proj_with_mqa(x).split(widths, dim=-1)

        # RoPE on the queries of all heads and on the one key that they share
        to_turn = torch.cat((q_rope, k_rope.unsqueeze(-2)), dim=-2)
        q_rope, k_rope = rotate(to_turn, rope.unsqueeze(-2)).split((h, 1), dim=-2)
        latent = torch.cat((self.kv_a_layernorm(kv), k_rope.squeeze(-2)), dim=-1)
        return q_nope, q_rope, latent

    def _queries(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, h * (dn + dr)], through their own latent if any."""
        if self.config.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def naive(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Write out keys and values of every head, then attend as usual.

        latent [B, S, c + dr]; mask booleans [T, S] or [B, T, S], None for plain causal
        attention. -> [B, T, h, dv].
        """
        config = self.config
        B, S, _ = latent.shape
        h = config.num_attention_heads
        dv = config.v_head_dim
        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        kv, k_rope = latent.split(widths, dim=-1)
        per_head = self.kv_b_proj(kv).unflatten(-1, (h, -1))
        k_nope, v = per_head.split((config.qk_nope_head_dim, dv), dim=-1)
        k_rope = k_rope.unsqueeze(-2).expand(B, S, h, -1).to(k_nope.dtype)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)

        # equal widths keep the fused kernel: 1.5x faster on a CPU at these sizes
        v = F.pad(v, (0, max(q.shape[-1] - dv, 0)))
        out = F.scaled_dot_product_attention(
            q.to(v.dtype).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if mask is None else mask.unsqueeze(-3),
            is_causal=mask is None,
            scale=self.softmax_scale,
        )
        return out.transpose(1, 2)[..., :dv]

    def absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The same numbers, and no key or value is ever written out.

        q_nope . (W_UK l) = (W_UK^T q_nope) . l: W_UK moves into the query, W_UV behind
        the softmax, and all heads attend to the same S latents, as in an MQA of width
        c + dr. latent [B, S, c + dr]; mask booleans [T, S] or [B, T, S], None where
        every query sees all S. -> [B, T, h, dv].
        """
        B, T, h, _ = q_nope.shape
        c = self.config.kv_lora_rank
        w_uk, w_uv = self.up_projections()

        # a matrix product a head: [h, B*T, dn] times [h, dn, c]
        by_head = q_nope.reshape(B * T, h, -1).transpose(0, 1)
        q_latent = torch.matmul(by_head, w_uk).transpose(0, 1).view(B, T, h, c)
        q = torch.cat((q_latent, q_rope), dim=-1).view(B, T * h, -1)

        if T == 1:
            # written out: the fused kernel is 3x slower here on a CPU at batch 64
            logits = torch.bmm(q, latent.transpose(1, 2)) * self.softmax_scale
            if mask is not None:
                logits = logits.masked_fill(~mask, float("-inf"))
            out = torch.bmm(logits.softmax(dim=-1), latent[..., :c])
        else:
            if mask is not None:
                mask = mask.repeat_interleave(h, dim=-2).unsqueeze(-3)
            keys = latent.unsqueeze(1)
            out = F.scaled_dot_product_attention(
                q.unsqueeze(1), keys, keys, attn_mask=mask, scale=self.softmax_scale
            )[..., :c]

        by_head = out.reshape(B * T, h, c).transpose(0, 1)
        out = torch.matmul(by_head, w_uv.transpose(1, 2))
        return out.transpose(0, 1).reshape(B, T, h, -1)

    def up_weight(self) -> Tensor:
        """The matrix of kv_b_proj as it multiplies: [h * (dn + dv), c]."""
        return self.kv_b_proj.weight

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [h, dn, c] and W_UV [h, dv, c], the two parts of kv_b_proj."""
        config = self.config
        by_head = self.up_weight().view(
            config.num_attention_heads, -1, config.kv_lora_rank
        )
        w_uk, w_uv = by_head.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        return w_uk, w_uv
