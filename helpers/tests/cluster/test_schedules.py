"""Schedules against the published formulas and picture, and torch's own order."""

import random
from collections import Counter
from types import SimpleNamespace

from helpers import cluster

import pytest
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

KINDS = ("1F1B", "ZB1P", "DualPipe", "DualPipeV")


def sizes(kind: str, rng: random.Random) -> tuple[int, int]:
    """(ranks, micro-batches) that `kind` can have."""
    ranks = (
        rng.choice((2, 4, 6, 8, 12, 16)) if kind == "DualPipe" else rng.randint(1, 10)
    )
    low = 2 * ranks if kind.startswith("Dual") else ranks
    return ranks, low + (
        2 * rng.randint(0, 6) if kind == "DualPipe" else rng.randint(0, 12)
    )


def idle(timeline: cluster.Timeline) -> list[float]:
    return [timeline.span - busy for busy in timeline.busy]


def cell(kind: str, micro_batch: int) -> cluster.Cell:
    return cluster.Cell((cluster.Part(kind, 0, micro_batch),))


def triples(cell: cluster.Cell) -> tuple:
    """(kind, stage, micro-batch) of each part."""
    return tuple((part.kind, part.stage, part.micro_batch) for part in cell.parts)


def word(cell: cluster.Cell) -> str:
    return "".join(part.kind for part in cell.parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cases"),
    [("1F1B", 100), ("ZB1P", 100), ("DualPipe", 100), ("DualPipeV", 100)],
)
def test_bubble_equals_the_published_formula_where_it_holds(kind, cases):
    rng = random.Random(kind)
    for _ in range(cases):
        ranks, micro = sizes(kind, rng)
        F, W = rng.uniform(0.5, 3), 0.0
        while not 0 < W <= F:
            W = rng.uniform(0, F)
        B = (
            F + W
            if kind.startswith("Dual")
            else W + rng.uniform(W, 3)
            if kind == "ZB1P"
            else W + rng.uniform(0.1, 3)
        )
        FB = rng.uniform(max(F, B), F + B)
        timeline = cluster.simulate(cluster.schedule(kind, ranks, micro), F, B, W, FB)
        assert max(idle(timeline)) == pytest.approx(
            cluster.bubble(kind, ranks, F, B, W, FB), abs=1e-9
        ), (ranks, micro, F, B, W, FB)
        if kind in ("1F1B", "ZB1P"):
            assert max(idle(timeline)) - min(idle(timeline)) < 1e-9


def test_the_formula_of_dualpipe_fails_when_the_forward_is_not_the_input_backward():
    timeline = cluster.simulate(
        cluster.schedule("DualPipe", 8, 20), F=1, B=2.2, W=1, FB=2.6
    )
    published = cluster.bubble("DualPipe", 8, F=1, B=2.2, W=1, FB=2.6)
    assert published == pytest.approx(5.4) and max(idle(timeline)) == pytest.approx(4.8)


@pytest.mark.parametrize("kind", KINDS)
def test_more_micro_batches_do_not_grow_the_bubble(kind):
    rng = random.Random(0)
    ranks, micro = sizes(kind, rng)
    bubbles = {
        round(
            max(idle(cluster.simulate(cluster.schedule(kind, ranks, micro + more)))), 9
        )
        for more in (0, 2, 4, 20)
    }
    assert len(bubbles) == 1


def test_peak_activations_are_the_published_ones():
    for ranks in (2, 4, 8, 16):
        peak = {
            kind: cluster.simulate(
                cluster.schedule(kind, ranks // (1 + (kind == "DualPipeV")), 2 * ranks)
            ).peak
            for kind in KINDS
        }
        assert peak["1F1B"] == [ranks - r for r in range(ranks)]
        assert peak["ZB1P"] == [ranks] * ranks
        assert peak["DualPipe"] == [ranks + 1] * ranks and peak["DualPipeV"] == [
            ranks + 1
        ] * (ranks // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_micro_batch_passes_every_stage_once_and_in_order(kind):
    rng = random.Random(1)
    for _ in range(10):
        ranks, micro = sizes(kind, rng)
        stages = 2 * ranks if kind == "DualPipeV" else ranks
        timeline = cluster.simulate(cluster.schedule(kind, ranks, micro))
        ends = {
            (k, s, m): end
            for rank in timeline.cells
            for cell, _, end in rank
            for k, s, m in triples(cell)
        }
        starts = {
            (k, s, m): start
            for rank in timeline.cells
            for cell, start, _ in rank
            for k, s, m in triples(cell)
        }
        counts = Counter(k for k, _, _ in ends)
        assert sum(
            len(cell.parts) for rank in timeline.cells for cell, _, _ in rank
        ) == len(ends)  # nothing twice
        assert (
            counts["F"] == counts["B"] + counts["I"] == stages * micro
            and counts["I"] == counts["W"]
        )
        for k, s, m in starts:
            if k == "F" and s:
                assert starts[k, s, m] >= ends["F", s - 1, m]
            if k in "BI":
                above = ends.get(("B", s + 1, m), ends.get(("I", s + 1, m), 0.0))
                assert starts[k, s, m] >= max(above, ends["F", s, m])
        for rank in timeline.cells:
            assert all(a[2] <= b[1] for a, b in zip(rank, rank[1:], strict=False))


@pytest.mark.parametrize(("ranks", "micro"), [(4, 10), (2, 4), (3, 6), (8, 40)])
def test_dualpipev_has_the_order_of_torch(ranks, micro):
    theirs = SimpleNamespace(
        pp_group_size=ranks, _n_microbatches=micro, _num_stages=2 * ranks
    )
    short = {
        "FORWARD": "F",
        "FULL_BACKWARD": "B",
        "BACKWARD_INPUT": "I",
        "BACKWARD_WEIGHT": "W",
    }
    for rank, ours in enumerate(cluster.schedule("DualPipeV", ranks, micro)):
        order = []
        for action in ScheduleDualPipeV._calculate_single_rank_operations(theirs, rank):
            if action is not None:
                parts = action.sub_actions or (action,)
                order.append(
                    tuple(
                        (
                            short[a.computation_type.name],
                            a.stage_index,
                            a.microbatch_index,
                        )
                        for a in parts
                    )
                )
        assert [triples(cell) for cell in ours] == order


# the upper half of the picture in the report and the DualPipe repository, by the
# published rules, white cells left out; the lower half mirrors it
PICTURE = [
    "F F F F F F F F I W F I W F I W F FB FB FB FB FB FB B FB B FB B FB B I W I W I "
    "W I W",
    "F F F F F F F F I W F I W F FB FB FB FB FB FB FB FB B FB B FB B B I I W I W I W W",
    "F F F F F F F F I W F FB FB FB FB FB FB FB FB FB FB B FB B B B I I I W I W W W",
    "F F F F F F F F F B FB FB FB FB FB FB FB FB FB FB FB B B B B I I I I W W W W",
]


def test_the_published_picture():
    """8 ranks, 20 micro-batches (DualPipeV: 4 and 10), F=1, B=2, I=W=1, F&B=3.

    66 units wide, 6 of them white on every rank.
    """
    timeline = cluster.simulate(cluster.schedule("DualPipe", 8, 20))
    assert timeline.span == 66 and idle(timeline) == [6] * 8
    counts = [Counter(word(cell) for cell, _, _ in rank) for rank in timeline.cells]
    published = [
        (11, 7, 4, 7, 9),
        (10, 6, 4, 6, 10),
        (9, 5, 4, 5, 11),
        (9, 4, 5, 4, 11),
    ]
    assert [
        tuple(c[k] for k in ("F", "I", "B", "W", "FB")) for c in counts
    ] == published + published[::-1]
    drawn = [" ".join(word(cell) for cell, _, _ in rank) for rank in timeline.cells]
    assert drawn == PICTURE + PICTURE[::-1]
    folded = cluster.simulate(cluster.schedule("DualPipeV", 4, 10))
    assert folded.span == 66 and idle(folded) == [6] * 4
    assert [
        " ".join(word(cell) for cell, _, _ in rank) for rank in folded.cells
    ] == PICTURE


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: cluster.schedule("DualPipe", 3, 12), "ranks=3"),
        (lambda: cluster.schedule("DualPipe", 4, 9), "micro_batches=9"),
        (lambda: cluster.schedule("DualPipe", 8, 14), "micro_batches=14"),
        (lambda: cluster.schedule("DualPipeV", 4, 7), "micro_batches=7"),
        (lambda: cluster.schedule("GPipe", 4, 8), "GPipe"),
        (lambda: cluster.schedule("1F1B", 0, 8), "ranks=0"),
        (lambda: cluster.schedule("1F1B", 2.0, 8), "ranks=2.0"),
        (lambda: cluster.schedule("1F1B", 2, True), "micro_batches=True"),
        (lambda: cluster.simulate([]), "order"),
        (lambda: cluster.simulate([[cell("F", 0)], []]), "order"),
        (lambda: cluster.simulate([[cell("F", 0)]], W=float("nan")), "W=nan"),
        (lambda: cluster.simulate([[cell("F", 0)]], B=float("inf")), "B=inf"),
        (
            lambda: cluster.simulate(cluster.schedule("1F1B", 2, 2), B=1, W=1),
            "W below B",
        ),
        (lambda: cluster.simulate([[cell("B", 0), cell("F", 0)]]), "every rank waits"),
    ],
)
def test_impossible_input_says_what_is_wrong(call, field):
    with pytest.raises(ValueError, match=field):
        call()
