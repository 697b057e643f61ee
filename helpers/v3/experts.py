"""DeepSeekMoE (V3 section 2.1.2): a router that chooses, experts that compute.

Shapes: B sequences of T tokens, BT of them in all, H hidden_size, E routed experts, K
chosen per token, f moe_intermediate_size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from helpers.v3.config import V3Config
from helpers.v3.grouped import PLAIN_PRODUCTS, run_experts, run_one_token

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Routing(NamedTuple):
    """What a router decided for BT tokens, and what training asks of it afterwards."""

    weights: Tensor  # [BT, K] of the chosen experts, float32
    chosen: Tensor  # [BT, K] the chosen experts
    scores: Tensor  # [BT, E] affinity to every expert
    sequences: int  # B

    def load(self) -> Tensor:
        """Tokens that each expert got: [E], float32."""
        return self._counts(parts=1).sum(dim=0)

    def balance_loss(
        self, config: V3Config, pool: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """How unevenly the experts are used: 1 when all get the same, up to E / K.

        V3's is taken within each sequence (eq. 17-20), that of Switch and Mixtral
        within the batch (`seq_aux=False`). To be multiplied by alpha. `pool` turns the
        counts of this batch into the mean over all processes that share it.
        """
        parts = self.sequences if config.seq_aux else 1
        E = config.n_routed_experts
        tokens = self.scores.shape[0] // parts
        counts = self._counts(parts)
        if pool is not None and not config.seq_aux:
            counts = pool(counts)
        share = counts * (E / (config.num_experts_per_tok * tokens))
        affinity = self.scores / self.scores.sum(dim=-1, keepdim=True)
        affinity = affinity.view(parts, tokens, E).mean(dim=1)
        return (share * affinity).sum(dim=-1).mean()

    def _counts(self, parts: int) -> Tensor:
        """Tokens of each of `parts` equal parts that chose each expert: [parts, E]."""
        index = self.chosen.view(parts, -1)
        counts = torch.zeros(
            parts, self.scores.shape[-1], device=index.device, dtype=torch.float32
        )
        return counts.scatter_add_(1, index, counts.new_ones(index.shape))


class Float32Buffers(nn.Module):
    """Buffers that stay float32 under `.bfloat16()` and `.half()`.

    In bfloat16 a bias of 1 would not move by 0.001, and angles at position 2,000 would
    be off by a third of a turn.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


class Router(Float32Buffers):
    """The gate (V3 eq. 12-16): affinities, then a choice that a bias balances.

    `e_score_correction_bias` [E] has a say in which experts are chosen and none in
    their weights. It is not learnt by gradient: see `update_bias`.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.config = config
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        bias = torch.zeros(E, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> Routing:
        """x [B, T, H] -> the routing of its tokens, in float32 even under autocast."""
        config = self.config
        with _no_autocast(x.device.type):
            logits = F.linear(x.flatten(0, -2).float(), self.weight.float())
            if config.scoring_func == "sigmoid":
                scores = logits.sigmoid()
            else:
                scores = logits.softmax(dim=-1)
            with torch.no_grad():
                index = self.select(scores)
            weights = scores.gather(-1, index)
            if config.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            weights = weights * config.routed_scaling_factor
        return Routing(weights, index, scores, x.shape[0])

    def select(self, scores: Tensor) -> Tensor:
        """scores [BT, E] -> the chosen experts [BT, K], from the best groups only.

        Experts lie in n_group groups, one a node. A token may go to `topk_group` of
        them: those with the largest sum of their two best experts (V3 section 2.1.2,
        node-limited routing).
        """
        config = self.config
        choice = scores + self.e_score_correction_bias
        if config.topk_group < config.n_group:
            groups = choice.unflatten(-1, (config.n_group, -1))
            group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
            best = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
            closed = torch.ones_like(group_scores, dtype=torch.bool)
            closed = closed.scatter_(-1, best, False)
            choice = groups.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        return choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, load: Tensor, gamma: float) -> None:
        """Change the bias: b_i += gamma * sign(mean load - load_i).

        load [E], tokens that each expert got in the whole batch (V3 section 2.1.2,
        auxiliary-loss-free load balancing).
        """
        self.e_score_correction_bias += gamma * torch.sign(load.mean() - load)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def loop_over_experts(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """What `Experts` computes, one expert after another: the code to read.

    x [BT, H], weights and index [BT, K], gate_up_proj [E, 2f, H], down_proj [E, H, f]
    -> [BT, H]. `grouped.run_experts` is the same, fast.
    """
    out = torch.zeros_like(x)
    for e in range(gate_up_proj.shape[0]):
        tokens, choice = torch.where(index == e)
        gate, up = (x[tokens] @ gate_up_proj[e].T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down_proj[e].T
        out = out.index_add(0, tokens, y * weights[tokens, choice, None].to(y.dtype))
    return out


class Experts(nn.Module):
    """All routed experts of a layer, their SwiGLU matrices stacked.

    gate_up_proj [E, 2f, H], down_proj [E, H, f]. `products` compute the two matrix
    products; helpers.v3.fp8 puts others in their place.
    """

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        E = config.n_routed_experts
        H = config.hidden_size
        f = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * f, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, f))
        self.products = PLAIN_PRODUCTS

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [BT, H], weights and index [BT, K] -> the experts' weighted sum [BT, H]."""
        gate_up_proj: Tensor = self.gate_up_proj
        down_proj: Tensor = self.down_proj
        if torch.is_autocast_enabled(x.device.type):
            # grouped_mm takes no part in autocast
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            gate_up_proj = gate_up_proj.to(dtype)
            down_proj = down_proj.to(dtype)
        plain = self.products is PLAIN_PRODUCTS
        if plain and x.shape[0] == 1 and not torch.is_grad_enabled():
            return run_one_token(x, weights, index, gate_up_proj, down_proj)
        return run_experts(x, weights, index, gate_up_proj, down_proj, self.products)


class MoE(nn.Module):
    """The shared experts see every token, the router chooses K of the others."""

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config.hidden_size, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [B, T, H] -> [B, T, H] (V3 eq. 12, without the residual), its routing."""
        routing = self.gate(x)
        out = self.experts(x.flatten(0, -2), routing.weights, routing.chosen).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, routing
