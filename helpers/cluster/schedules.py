"""Pipeline schedules: what each rank does, in order (V3 section 3.2.1).

A micro-batch passes the stages forward, then backward. The backward has two parts: the
gradient of the input (I), which the stage before waits for, and the gradient of the
weights (W), which nobody waits for. Schedules differ in what stands where.

The order of DualPipe and DualPipeV is that of github.com/deepseek-ai/DualPipe.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

from helpers.checks import Count, check, need

# F forward, B whole backward, I gradient of the input, W gradient of the weights
Kind = Literal["F", "B", "I", "W"]
KINDS = ("1F1B", "ZB1P", "DualPipe", "DualPipeV")


@dataclass(frozen=True)
class Part:
    """One piece of work for one stage."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} of stage {self.stage}"


@dataclass(frozen=True)
class Cell:
    """What a rank does at a time: one part, or a forward and a backward that overlap.

    While one of the two computes, the other sends.
    """

    parts: tuple[Part, ...]

    @property
    def overlapped(self) -> bool:
        """Whether two parts run at the same time."""
        return len(self.parts) == 2

    def __str__(self) -> str:
        return " & ".join(str(part) for part in self.parts)


class Direction(NamedTuple):
    """A way through the pipeline, as one rank sees it."""

    stage: int  # which stage of that way the rank holds
    first: int  # number of the first micro-batch that goes this way


class Rank:
    """Writes down what one rank does; knows which micro-batch is next in each way."""

    def __init__(self, *directions: Direction) -> None:
        self.directions = directions
        self.cells: list[Cell] = []
        self._forwards = [0 for _ in directions]
        self._backwards = [0 for _ in directions]
        # backward passes of the input whose weights are still to do, oldest first
        self._waiting: deque[Part] = deque()

    def forward(self, way: int = 0) -> None:
        """Forward of the next micro-batch."""
        self.cells.append(Cell((self._forward(way),)))

    def backward(self, way: int = 0) -> None:
        """Whole backward of the next micro-batch."""
        self.cells.append(Cell((self._backward("B", way),)))

    def input_backward(self, way: int = 0) -> None:
        """Only the input's gradient; the weights' one waits for `weight_backward`."""
        part = self._backward("I", way)
        self._waiting.append(part)
        self.cells.append(Cell((part,)))

    def weight_backward(self) -> None:
        """The weights' gradient that has waited longest."""
        oldest = self._waiting.popleft()
        self.cells.append(Cell((Part("W", oldest.stage, oldest.micro_batch),)))

    def forward_and_backward(self, forward_way: int, backward_way: int) -> None:
        """A forward one way and a whole backward the other way, at the same time."""
        parts = (self._forward(forward_way), self._backward("B", backward_way))
        self.cells.append(Cell(parts))

    def _forward(self, way: int) -> Part:
        stage, first = self.directions[way]
        micro_batch = first + self._forwards[way]
        self._forwards[way] += 1
        return Part("F", stage, micro_batch)

    def _backward(self, kind: Kind, way: int) -> Part:
        stage, first = self.directions[way]
        micro_batch = first + self._backwards[way]
        self._backwards[way] += 1
        return Part(kind, stage, micro_batch)


def schedule(kind: str, ranks: int, micro_batches: int) -> list[list[Cell]]:
    """What each rank does, in order: kind is 1F1B, ZB1P, DualPipe or DualPipeV.

    1F1B and ZB1P have a stage a rank. DualPipe has `ranks` stages too, each on two
    ranks: half of the micro-batches enter at either end. DualPipeV has 2 * ranks
    stages; each rank holds two, and all micro-batches go down and come back up. Raises
    ValueError for other kinds and sizes: DualPipe needs even numbers, and both need
    2 * ranks <= micro_batches.
    """
    need(kind in KINDS, "kind", kind, f"use one of {', '.join(KINDS)}")
    check("ranks", ranks, Count)
    check("micro_batches", micro_batches, Count)
    if kind == "1F1B":
        return [_one_f_one_b(r, ranks, micro_batches) for r in range(ranks)]
    if kind == "ZB1P":
        return [_zero_bubble(r, ranks, micro_batches) for r in range(ranks)]
    if kind == "DualPipe":
        even = "DualPipe folds the pipeline and feeds both ends: it must be even"
        need(ranks % 2 == 0, "ranks", ranks, even)
        need(micro_batches % 2 == 0, "micro_batches", micro_batches, even)
    enough = micro_batches >= 2 * ranks
    least = f"it must be at least 2 * ranks = {2 * ranks}"
    need(enough, "micro_batches", micro_batches, least)
    if kind == "DualPipe":
        return [_dualpipe(r, ranks, micro_batches) for r in range(ranks)]
    return [_dualpipe_v(r, ranks, micro_batches) for r in range(ranks)]


def _one_f_one_b(rank: int, ranks: int, micro_batches: int) -> list[Cell]:
    """After a warm-up, one forward, one backward."""
    order = Rank(Direction(rank, 0))
    early = min(ranks - 1 - rank, micro_batches)
    for _ in range(early):
        order.forward()
    for n in range(micro_batches):
        if n < micro_batches - early:
            order.forward()
        order.backward()
    return order.cells


def _zero_bubble(rank: int, ranks: int, micro_batches: int) -> list[Cell]:
    """1F1B with the backward split: W fills holes, and rank r keeps r of them back."""
    order = Rank(Direction(rank, 0))
    early = min(ranks - 1 - rank, micro_batches)
    for _ in range(early):
        order.forward()
    for n in range(micro_batches):
        if n < micro_batches - early:
            order.forward()
        order.input_backward()
        if n >= rank:
            order.weight_backward()
    for _ in range(min(rank, micro_batches)):
        order.weight_backward()
    return order.cells


def _dualpipe(rank: int, ranks: int, micro_batches: int) -> list[Cell]:
    """Micro-batches enter from both ends; a rank holds a stage of either way."""
    half = micro_batches // 2
    down = Direction(rank, 0)
    up = Direction(ranks - 1 - rank, half)
    # way 0 is the one whose end of the pipeline is nearer
    first_half = rank < ranks // 2
    order = Rank(down, up) if first_half else Rank(up, down)
    from_end = min(rank, ranks - 1 - rank)
    _eight_steps(order, from_end, ranks // 2, half)
    return order.cells


def _dualpipe_v(rank: int, ranks: int, micro_batches: int) -> list[Cell]:
    """The same, folded: way 0 goes down the ranks, way 1 comes back up."""
    order = Rank(Direction(rank, 0), Direction(2 * ranks - 1 - rank, 0))
    _eight_steps(order, rank, ranks, micro_batches)
    return order.cells


def _eight_steps(  # noqa: C901 (the published steps, to be read in one piece)
    order: Rank, from_end: int, depth: int, micro_batches: int
) -> None:
    """Add to `order` the eight steps of DualPipe.

    from_end: ranks between this one and the nearer end. depth: ranks from an end to the
    middle. micro_batches: of one way.
    """
    inwards = depth - from_end - 1  # ranks between this one and the middle

    # 1. Warm-up: forwards of way 0 until way 1 arrives
    for _ in range(2 * inwards):
        order.forward(0)

    # 2. Both ways forward
    for _ in range(from_end + 1):
        order.forward(0)
        order.forward(1)

    # 3. Way 1 turns round: its backwards are split, so that no rank waits for a W
    for _ in range(inwards):
        order.input_backward(1)
        order.weight_backward()
        order.forward(1)

    # 4. The long middle: each way's forward overlaps the other way's backward
    for n in range(micro_batches - 2 * depth + from_end + 1):
        if n == 0 and inwards == 0:
            # the middle rank has nothing to overlap yet ("to further reduce bubble")
            order.forward(0)
            order.backward(1)
        else:
            order.forward_and_backward(0, 1)
        order.forward_and_backward(1, 0)

    # 5. Way 0 has no forwards left
    for _ in range(inwards):
        order.backward(1)
        order.forward_and_backward(1, 0)

    # 6. Only backwards are left, of way 1 and way 0 in turn; the second half is split
    # again, and its W wait
    whole = from_end + 1
    for n in range(2 * whole):
        way = 1 - n % 2
        if n < whole:
            order.backward(way)
        else:
            order.input_backward(way)

    # 7. The last backwards of way 0, with a W between
    for _ in range(inwards):
        order.weight_backward()
        order.input_backward(0)

    # 8. What is left of W
    for _ in range(from_end + 1):
        order.weight_backward()
