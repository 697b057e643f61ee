"""Traffic of a routing over two kinds of links, against DeepEP's figures."""

from helpers import cluster
from helpers.evidence.facts import fact
from helpers.v3 import Router, V3Config

import pytest
import torch

# bytes of a token: FP8 with a float32 scale per 128 values, BF16
DISPATCH = 7168 * (1 + 4 / 128)
COMBINE = 7168 * 2


def routed(
    tokens: int, groups: int, limit: int, experts: int = 256, top: int = 8
) -> torch.Tensor:
    """[tokens, top] choices of V3's gate at random affinities."""
    config = V3Config(
        hidden_size=4,
        n_routed_experts=experts,
        num_experts_per_tok=top,
        n_group=groups,
        topk_group=limit,
    )
    return Router(config).select(
        torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    )


def test_reach_of_tokens_placed_by_hand():
    index = torch.tensor(
        [[0, 1], [0, 7], [4, 5], [2, 6]]
    )  # 8 experts, 4 GPUs of 2, 2 nodes of 2; token i starts on GPU i
    to = cluster.reach(index, 8, 4, per_node=2)
    assert to[:3] == ((1 + 2 + 1 + 2) / 4, (0 + 1 + 0 + 1) / 4, (1 + 2 + 1 + 2) / 4)
    assert to.busiest_node == 1.0 and to.busiest_rank == pytest.approx(
        2 / 1.5
    )  # arrivals by node 1, 1; copies by GPU 2, 1, 1, 2


def test_reach_grows_with_the_limit_and_stays_below_it():
    reached = [cluster.reach(routed(2048, 8, limit), 256, 64) for limit in range(1, 9)]
    assert all(to.nodes <= limit for limit, to in enumerate(reached, 1))
    assert [to.nodes for to in reached] == sorted(to.nodes for to in reached)
    assert reached[3].nodes > 3.9 and reached[7].nodes == pytest.approx(
        8 * (1 - (7 / 8) ** 8), rel=0.02
    )  # 8 balls in 8 boxes


@pytest.mark.parametrize("name", ["EP8", "EP16", "EP32", "EP64", "V2 EP32"])
def test_links_are_within_12_percent_of_the_published_bandwidths(name):
    ranks = int(name.rpartition("EP")[2])
    nodes = ranks // 8
    to = cluster.reach(routed(8192, nodes, min(nodes, 4)), 256, ranks)
    for size, key in ((DISPATCH, "deepep.dispatch"), (COMBINE, "deepep.combine")):
        seconds = max(cluster.all_to_all(4096, to, size))
        logical = (
            4096 * (to.nodes if nodes > 1 else to.ranks) * size / seconds / 1e9
        )  # the published figures count a token's own node too
        assert logical == pytest.approx(fact(key).value[name], rel=0.12)


def test_at_two_nodes_the_second_version_is_bound_by_infiniband_alone():
    to = cluster.reach(routed(8192, 2, 2), 256, 16)
    slow, seconds = cluster.all_to_all(8192, to, DISPATCH)
    assert 8192 * to.nodes * DISPATCH / seconds / 1e9 == pytest.approx(
        fact("deepep.dispatch").value["V2 EP16"], rel=0.12
    )
    assert (
        slow > 1.5 * seconds
    )  # the first version's kernel, which the NVLink constant describes, could not


def test_time_is_bytes_over_bandwidth():
    to = cluster.Reach(2, 1, 3, 1, 1)
    assert cluster.all_to_all(10, to, 100, nvlink=1000, infiniband=50) == (3.0, 20.0)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (
            lambda: cluster.all_to_all(1, cluster.Reach(1, 1, 1, 1, 1), 8, nvlink=0),
            "nvlink",
        ),
        (
            lambda: cluster.all_to_all(
                1, cluster.Reach(1, 1, 1, 1, 1), 8, infiniband=float("nan")
            ),
            "infiniband",
        ),
        (lambda: cluster.reach(torch.zeros(1, 1, dtype=torch.long), 10, 4), "ranks=4"),
        (
            lambda: cluster.reach(
                torch.zeros(1, 1, dtype=torch.long), 16, 8, per_node=3
            ),
            "per_node=3",
        ),
        (lambda: cluster.reach(torch.zeros(0, 2, dtype=torch.long), 8, 4, 2), "index"),
        (lambda: cluster.reach(torch.zeros(2, 0, dtype=torch.long), 8, 4, 2), "index"),
        (lambda: cluster.reach(torch.zeros(2, dtype=torch.long), 8, 4, 2), "index"),
        (lambda: cluster.reach(torch.zeros(2, 2), 8, 4, 2), "index=torch.float32"),
        (lambda: cluster.reach(torch.tensor([[0, 8]]), 8, 4, 2), r"index=\[0, 8\]"),
        (lambda: cluster.reach(torch.tensor([[-1, 3]]), 8, 4, 2), r"index=\[-1, 3\]"),
        (lambda: cluster.reach(torch.tensor([[0]]), 0, 4, 2), "experts=0"),
        (lambda: cluster.reach(torch.tensor([[0]]), 8, 4.0, 2), "ranks=4.0"),
        (lambda: cluster.all_to_all(-1, cluster.Reach(1, 1, 1, 1, 1), 8), "tokens=-1"),
    ],
)
def test_impossible_input_says_what_is_wrong(call, field):
    with pytest.raises(ValueError, match=field):
        call()
