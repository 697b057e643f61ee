"""How much of a routing crosses which link, and how long that takes."""

from typing import NamedTuple

from helpers.checks import Count, NonNegative, Positive, check, need

import torch
from torch import Tensor

# What one H800 of a node of 8 gets out of its links under DeepEP's kernels, bytes per
# second: notebook 07 fits both to the published table.
NVLINK = 155e9
INFINIBAND = 44e9


class Reach(NamedTuple):
    """To how many places a token must be copied, as means over the tokens."""

    nodes: float
    remote: float  # nodes other than the token's own: copies over InfiniBand
    ranks: float  # GPUs, its own too: copies over NVLink, also those from InfiniBand
    busiest_node: float  # load of the busiest node over the mean
    busiest_rank: float


def reach(index: Tensor, experts: int, ranks: int, per_node: int = 8) -> Reach:
    """Where the tokens of index [tokens, K] (their chosen experts) must go.

    The experts lie in order on `ranks` GPUs, `per_node` to a node; the tokens start
    evenly from all ranks, in order. One copy a node crosses InfiniBand and is forwarded
    inside it (V3 section 3.2.2). Raises InputError for what does not divide, for no
    tokens and for experts that there are not.
    """
    check("experts", experts, Count)
    check("ranks", ranks, Count)
    check("per_node", per_node, Count)
    divides = experts % ranks == 0
    need(divides, "ranks", ranks, f"the {experts} experts must divide evenly over them")
    need(ranks % per_node == 0, "per_node", per_node, f"it must divide ranks={ranks}")
    _check_index(index, experts)
    tokens = len(index)

    hit = torch.zeros(tokens, ranks)
    hit.scatter_(1, index // (experts // ranks), 1.0)
    nodes = hit.unflatten(1, (-1, per_node)).amax(dim=-1)

    rows = torch.arange(tokens)
    own_node = rows * ranks // tokens // per_node
    remote = nodes.clone()
    remote[rows, own_node] = 0.0
    return Reach(
        nodes=_mean_copies(nodes),
        remote=_mean_copies(remote),
        ranks=_mean_copies(hit),
        busiest_node=_busiest(remote),
        busiest_rank=_busiest(hit),
    )


def _check_index(index: Tensor, experts: int) -> None:
    """Raise InputError unless index [tokens, K] names some of the experts."""
    shape = list(index.shape)
    filled = index.ndim == 2 and index.numel() > 0
    need(filled, "index", shape, "it must hold a token and an expert at least")
    whole = index.dtype in (torch.int32, torch.int64)
    need(whole, "index", index.dtype, "it must be int32 or int64")
    lowest = int(index.min())
    highest = int(index.max())
    known = lowest >= 0 and highest < experts
    remedy = f"experts are numbered from 0 to {experts - 1}"
    need(known, "index", [lowest, highest], remedy)


def _mean_copies(copies: Tensor) -> float:
    """Mean over tokens of the places that each must go to; copies [tokens, places]."""
    return (copies.sum() / len(copies)).item()


def _busiest(copies: Tensor) -> float:
    """Load of the busiest place over the mean load; copies [tokens, places]."""
    load = copies.sum(0)
    return (load.max() / load.mean().clamp(min=1e-9)).item()


def all_to_all(
    tokens: int,
    to: Reach,
    size: float,
    nvlink: float = NVLINK,
    infiniband: float = INFINIBAND,
) -> tuple[float, float]:
    """Seconds on NVLink and on InfiniBand to send `tokens` per GPU of `size` bytes.

    Both links run at once, so the longer time counts. Links in bytes per second. Raises
    InputError for links, sizes and tokens that cannot be.
    """
    check("tokens", tokens, NonNegative)
    check("nvlink", nvlink, Positive)
    check("infiniband", infiniband, Positive)
    check("size", size, Positive)
    return tokens * to.ranks * size / nvlink, tokens * to.remote * size / infiniband
