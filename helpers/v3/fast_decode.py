"""Decoding in a flat loop over plain tensors: the fast path behind `generate.decode`.

`DeepSeekV3.hidden` with a cache is the code to read; here are the same numbers up to
rounding. One token of a small model spends its time on starting some 60 kernels a
layer, not on multiplying. So whatever no token changes is multiplied once, when the
`Decoder` is made, and fewer kernels are left:

- W_UK goes into the queries' up-projection and W_UV into the output projection
  (absorbed, V3 section 2.1.1): a head asks with c + dr numbers and is answered with c;
- the down-projections of query and latent are one product, as are gate and up;
- the softmax scale and the weights of the norms before these products go into them;
- experts are one batched product: each gets as many rows as the busiest one, which is
  wasted work, and less of it than starting a product for each of them.

Absorbed matrices are larger than their factors in a model of V3's own size; `fits`
says where they pay.

Shapes: B sequences, H hidden_size, h heads, c kv_lora_rank, dn qk_nope_head_dim, dr
qk_rope_head_dim, r the width that queries are made from (q_lora_rank, or H), E experts.
"""

from typing import NamedTuple

from helpers.v3.attention import MLA, LatentCache
from helpers.v3.experts import MLP, Experts, MoE, Router
from helpers.v3.grouped import PLAIN_PRODUCTS
from helpers.v3.model import MTP, Block, DeepSeekV3
from helpers.v3.norm import RMSNorm

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers in a layer's absorbed queries and in its experts' down-projections (which are
# copied), up to which they pay.
MOST_ABSORBED = 2**20
MOST_COPIED = 2**22
PLAIN_MODULES = (
    DeepSeekV3,
    Block,
    MTP,
    MLA,
    MLP,
    MoE,
    Router,
    Experts,
    RMSNorm,
    nn.Linear,
    nn.Embedding,
    nn.ModuleList,
)


def fits(model: DeepSeekV3) -> bool:
    """Whether a `Decoder` may stand for the model.

    It must be float32 on a CPU, small enough, and every module the plain one: FP8
    modules compute other numbers, and a hook wants to be called.
    """
    config = model.config
    weight = model.lm_head.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    c = config.kv_lora_rank
    r = config.q_lora_rank or config.hidden_size
    absorbed = config.num_attention_heads * (c + config.qk_rope_head_dim) * r
    copied = config.n_routed_experts * config.moe_intermediate_size * config.hidden_size
    if absorbed > MOST_ABSORBED or copied > MOST_COPIED:
        return False
    # the pairs that RoPE turns in place must begin at even places
    if c % 2 or r % 2:
        return False
    return all(_is_plain(module) for module in model.modules())


def _is_plain(module: nn.Module) -> bool:
    if type(module) not in PLAIN_MODULES:
        return False
    if isinstance(module, Experts) and module.products is not PLAIN_PRODUCTS:
        return False
    patched = "forward" in vars(module) or "hidden" in vars(module)
    return not (patched or module._forward_hooks or module._forward_pre_hooks)


class Attention(NamedTuple):
    """MLA's weights as decoding multiplies them."""

    down: Tensor  # [r + c + dr, H] behind the block's first norm; no r where r = H
    queries: Tensor  # [h * (c + dr), r] behind the norm of the query latent
    latent_norm: Tensor  # [c]
    out: Tensor  # [H, h * c]


class FeedForward(NamedTuple):
    """The second half of a block."""

    norm: Tensor  # [H]
    dense: tuple[Tensor, Tensor] | None  # [2f, H] and [H, f]; or the shared experts'
    routed: "Routed | None"


class Routed(NamedTuple):
    """The routed experts of a layer, and who chooses among them."""

    gate: Router
    gate_up: Tensor  # [E, 2f, H]
    down: Tensor  # [E, f, H]


class Decoder:
    """A model's weights, made ready to read one token of each row at a time."""

    def __init__(self, model: DeepSeekV3, length: int) -> None:
        """`length`: how many positions there will be at most."""
        self.model = model
        self.config = model.config
        self.turns = model.rope(0, length)
        self.layers = []
        for block in model.layers:
            assert isinstance(block, Block)
            self.layers.append((_attention(block), _feed_forward(block)))

    def read(self, tokens: Tensor, cache: LatentCache) -> Tensor:
        """tokens [B], next in their rows -> logits [B, V]. The cache grows by them."""
        model = self.model
        eps = self.config.rms_norm_eps
        mask = cache.visible(1)
        turn = self.turns[cache.length]
        x = F.embedding(tokens, model.embed_tokens.weight)
        for layer, rows in zip(self.layers, cache.rows, strict=True):
            attention, feed_forward = layer
            seen = rows[:, : cache.length + 1]
            x = x + self._attend(_unit(x, eps), attention, seen, turn, mask)
            normed = _unit(x, eps) * feed_forward.norm
            x = x + self._feed(normed, feed_forward)
        cache.length += 1
        return F.linear(_unit(x, eps) * model.norm.weight, model.lm_head.weight)

    def _attend(
        self,
        x: Tensor,
        weights: Attention,
        seen: Tensor,
        turn: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """x [B, H] of length 1 -> [B, H]. Writes the last of seen [B, S, c + dr]."""
        config = self.config
        h = config.num_attention_heads
        c = config.kv_lora_rank
        dr = config.qk_rope_head_dim
        down = F.linear(x, weights.down)
        kv = down[:, -c - dr : -dr]
        k_rope = down[:, -dr:]
        if config.q_lora_rank is not None:
            x = _unit(down[:, : -c - dr], 1e-6)  # MLA's eps for both latents
        q = F.linear(x, weights.queries).view(-1, h, c + dr)

        _turn_in_place(q[..., c:], turn)
        _turn_in_place(k_rope, turn)
        new = seen[:, -1]
        torch.mul(_unit(kv, 1e-6), weights.latent_norm, out=new[:, :c])
        new[:, c:] = k_rope

        logits = torch.bmm(q, seen.transpose(1, 2))
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        answer = torch.bmm(logits.softmax(dim=-1), seen[..., :c])
        return F.linear(answer.flatten(1), weights.out)

    def _feed(self, x: Tensor, weights: FeedForward) -> Tensor:
        """x [B, H], normed -> [B, H]."""
        out = torch.zeros_like(x)
        if weights.dense is not None:
            gate_up, down = weights.dense
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            out = F.linear(F.silu(gate).mul_(up), down)
        if weights.routed is not None:
            routing = weights.routed.gate(x.unsqueeze(1))
            run = _run_one if x.shape[0] == 1 else _run_few
            out = out + run(x, routing.weights, routing.chosen, weights.routed)
        return out


def _run_one(x: Tensor, weights: Tensor, chosen: Tensor, experts: Routed) -> Tensor:
    """x [1, H], weights and chosen [1, K] -> the sum of its experts' answers [1, H]."""
    H = x.shape[-1]
    gate_up = experts.gate_up.index_select(0, chosen[0])
    gate, up = F.linear(x, gate_up.view(-1, H)).view(-1, gate_up.shape[1]).chunk(2, -1)
    # the K activations in a row times their K matrices in a column: the sum over both
    activation = F.silu(gate).mul_(up).mul_(weights.t())
    return activation.view(1, -1) @ experts.down.index_select(0, chosen[0]).view(-1, H)


def _run_few(x: Tensor, weights: Tensor, chosen: Tensor, experts: Routed) -> Tensor:
    """x [B, H], weights and chosen [B, K] -> [B, H], for a few rows of each expert.

    Expert e owns the places e * most to (e + 1) * most - 1 of a buffer, and its rows
    stand in the first of them.
    """
    B, K = chosen.shape
    E, _, H = experts.gate_up.shape
    expert, row = chosen.flatten().sort(stable=True)  # row i * K + k: choice k of i
    counts = torch.bincount(expert, minlength=E)
    most = int(counts.max())
    before = counts.cumsum(0) - counts
    nth_of_expert = torch.arange(B * K) - before[expert]
    place = expert * most + nth_of_expert

    buffer = x.new_zeros(E * most, H)
    buffer.index_copy_(0, place, x.index_select(0, row // K))
    gate_up = torch.bmm(buffer.view(E, most, H), experts.gate_up.transpose(1, 2))
    gate, up = gate_up.chunk(2, dim=-1)
    answers = torch.bmm(F.silu(gate).mul_(up), experts.down).view(E * most, H)

    place_of_row = torch.empty_like(row).scatter_(0, row, place)
    of_token = answers.index_select(0, place_of_row).view(B, K, H)
    return torch.bmm(weights.unsqueeze(1), of_token).squeeze(1)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x [B, H] / its root mean square: RMSNorm without weights, in fewer kernels."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.shape[0] == 1:
        size = length.item()
        return x * (size * size / x.shape[-1] + eps) ** -0.5
    return x * (length.square_().div_(x.shape[-1]).add_(eps).rsqrt_())


def _turn_in_place(x: Tensor, turn: Tensor) -> None:
    """Change x [..., dr]: RoPE by turn [dr/2]."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)


def _attention(block: Block) -> Attention:
    attention = block.self_attn
    config = attention.config
    h = config.num_attention_heads
    dn = config.qk_nope_head_dim
    latent_down = attention.kv_a_proj_with_mqa.weight
    if config.q_lora_rank is None:
        down = latent_down
        up = attention.q_proj.weight * block.input_layernorm.weight
    else:
        down = torch.cat((attention.q_a_proj.weight, latent_down))
        up = attention.q_b_proj.weight * attention.q_a_layernorm.weight

    # q_nope . (W_UK l) = (W_UK^T q_nope) . l, head by head
    w_uk, w_uv = attention.up_projections()
    up_nope, up_rope = up.view(h, -1, up.shape[-1]).split(
        (dn, config.qk_rope_head_dim), dim=1
    )
    absorbed = torch.bmm(w_uk.transpose(1, 2), up_nope)
    queries = torch.cat((absorbed, up_rope), dim=1).flatten(0, 1)

    by_head = attention.o_proj.weight.view(config.hidden_size, h, -1).transpose(0, 1)
    out = torch.bmm(by_head, w_uv).transpose(0, 1).flatten(1)
    return Attention(
        down * block.input_layernorm.weight,
        queries * attention.softmax_scale,
        attention.kv_a_layernorm.weight,
        out,
    )


def _feed_forward(block: Block) -> FeedForward:
    norm = block.post_attention_layernorm.weight
    if not isinstance(block.mlp, MoE):
        return FeedForward(norm, _stacked(block.mlp), None)
    experts = block.mlp.experts
    down = experts.down_proj.transpose(1, 2).contiguous()
    routed = Routed(block.mlp.gate, experts.gate_up_proj, down)
    shared = block.mlp.shared_experts
    dense = None if shared is None else _stacked(shared)
    return FeedForward(norm, dense, routed)


def _stacked(mlp: MLP) -> tuple[Tensor, Tensor]:
    """gate over up [2f, H], and down [H, f]."""
    gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    return gate_up, mlp.down_proj.weight
