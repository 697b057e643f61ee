"""The formulas of GRPO: advantages, weights of tokens, loss (R1 v2, eq. 1-3).

Shapes: B answers, n tokens of the longest one.
"""

from typing import Literal

import torch
from torch import Tensor

# "sequence": every answer weighs the same (GRPO); "token": every token of the batch
# does (DAPO); "constant": every token, by no length that the model chose (Dr. GRPO)
Level = Literal["sequence", "token", "constant"]


def advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """How much better than its group each answer is: (r - mean) / std.

    rewards [questions, group] -> [questions, group]. Exactly 0 in a group that agrees:
    the mean of equal numbers may differ from them by a rounding, and the division by a
    spread of nothing but roundings would make a signal of it.
    """
    best = rewards.amax(dim=1, keepdim=True)
    worst = rewards.amin(dim=1, keepdim=True)
    agrees = best == worst

    advantage = rewards - rewards.mean(dim=1, keepdim=True)
    if divide_by_std:
        std = rewards.std(dim=1, keepdim=True, correction=0)
        advantage = advantage / (std + 1e-6)
    return advantage.masked_fill(agrees, 0.0)


def row_weights(lengths: Tensor, level: Level, max_new_tokens: int) -> Tensor:
    """Weight [B] of each token of an answer; lengths [B] in tokens.

    The losses of all tokens, so weighted, add up to the loss of the batch.
    """
    if level == "sequence":
        return 1 / (len(lengths) * lengths)
    tokens = len(lengths) * max_new_tokens
    if level == "token":
        tokens = int(lengths.sum())
    return torch.full(lengths.shape, 1 / tokens)


def grpo_loss(
    log_probs: Tensor,
    old: Tensor,
    advantage: Tensor,
    weights: Tensor,
    clip: float,
    kl: float = 0.0,
    reference: Tensor | None = None,
) -> Tensor:
    """GRPO's objective with its sign turned (R1 v2, eq. 1-2).

    log_probs, old and reference [B, n] are log-probabilities of the tokens drawn: by
    the policy that learns, the one that drew them, and the reference. advantage [B].
    weights [B, n]: 0 on padding, where the others may hold anything.

    The divergence is estimated by k3 = exp(d) - d - 1, d = reference - log_probs. On
    tokens that the policy itself drew, the mean of k3 is KL(policy || reference); but
    the gradient that flows through it there is that of KL(reference || policy).
    """
    # padding must not reach an exp: 0 * infinity is NaN, in the value or the gradient
    inside = weights > 0
    ratio = torch.where(inside, log_probs - old, 0.0).exp()
    advantage = advantage[:, None]
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    if reference is not None:
        d = torch.where(inside, reference - log_probs, 0.0)
        gain = gain - kl * (d.exp() - d - 1)
    return -(gain * weights).sum()
