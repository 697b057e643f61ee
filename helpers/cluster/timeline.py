"""When everything in a schedule happens, and how long ranks wait."""

from typing import NamedTuple

from helpers.checks import InputError, Positive, check, need
from helpers.cluster.schedules import Cell, Kind, Part


class Timed(NamedTuple):
    """A cell with its times."""

    cell: Cell
    start: float
    end: float


class Timeline(NamedTuple):
    """When everything happens, in the units of the costs: one entry per rank."""

    span: float
    busy: list[float]
    cells: list[list[Timed]]
    # most micro-batches whose activations a rank holds: their forward has begun, the
    # gradient of the weights is not done
    peak: list[int]


def simulate(
    order: list[list[Cell]],
    F: float = 1,
    B: float = 2,
    W: float = 1,
    FB: float = 3,
) -> Timeline:
    """Run each rank's cells in order, each as soon as rank and inputs are ready.

    Sending takes no time of its own. Costs of a forward, a whole backward, its part W
    for the weights, and an overlapped pair. Raises InputError for costs that cannot be,
    for a rank that does nothing and for an order in which every rank waits for another
    one.
    """
    for name, given in {"F": F, "B": B, "W": W, "FB": FB}.items():
        check(name, float(given), Positive)  # float: numpy's numbers will do
    need(W < B, "W", W, f"it is a part of the whole backward, so W below B={B}")
    lengths = [len(rank) for rank in order]
    at_work = len(lengths) > 0 and min(lengths) > 0
    need(at_work, "order", lengths, "there must be a rank, and each needs a cell")
    cost: dict[Kind, float] = {"F": F, "B": B, "I": B - W, "W": W}
    last_stage = max(p.stage for rank in order for cell in rank for p in cell.parts)

    ends: dict[Part, float] = {}  # when each part was done; a B also stands as its I
    done: list[list[Timed]] = [[] for _ in order]
    cells = sum(len(rank) for rank in order)
    while sum(len(rank) for rank in done) < cells:
        before = len(ends)
        for timed, rank in zip(done, order, strict=True):
            _advance(timed, rank, ends, cost, FB, last_stage)
        if len(ends) == before:
            raise InputError("order cannot work: every rank waits for another one")
    span = max(timed[-1].end for timed in done)
    busy = []
    for timed in done:
        busy.append(sum(cell.end - cell.start for cell in timed))
    peak = [_peak(rank) for rank in order]
    return Timeline(span, busy, done, peak)


def _advance(
    timed: list[Timed],
    rank: list[Cell],
    ends: dict[Part, float],
    cost: dict[Kind, float],
    pair_cost: float,
    last_stage: int,
) -> None:
    """Add to `timed` and `ends` the cells of one rank whose inputs are there."""
    for cell in rank[len(timed) :]:
        inputs = []
        for part in cell.parts:
            inputs += _inputs(part, last_stage)
        if not all(needed in ends for needed in inputs):
            return
        start = timed[-1].end if timed else 0.0
        for needed in inputs:
            start = max(start, ends[needed])
        took = pair_cost if cell.overlapped else cost[cell.parts[0].kind]
        end = start + took
        for part in cell.parts:
            ends[_arrival(part)] = end
        timed.append(Timed(cell, start, end))


def _inputs(part: Part, last_stage: int) -> list[Part]:
    """What must be done before `part`."""
    stage = part.stage
    micro_batch = part.micro_batch
    if part.kind == "F":
        if stage == 0:
            return []
        return [Part("F", stage - 1, micro_batch)]
    if part.kind == "W":
        return [Part("I", stage, micro_batch)]
    needed = [Part("F", stage, micro_batch)]
    if stage < last_stage:
        needed.append(Part("I", stage + 1, micro_batch))
    return needed


def _arrival(part: Part) -> Part:
    """What others wait for: a whole backward brings the gradient of the input too."""
    if part.kind == "B":
        return Part("I", part.stage, part.micro_batch)
    return part


def _peak(rank: list[Cell]) -> int:
    """Most micro-batches in the rank's memory at a time."""
    held = 0
    most = 0
    for cell in rank:
        for part in cell.parts:
            if part.kind == "F":
                held += 1
        most = max(most, held)
        for part in cell.parts:
            if part.kind in ("B", "W"):
                held -= 1
    return most


def bubble(kind: str, ranks: int, F: float, B: float, W: float, FB: float) -> float:
    """Published idle time of the idlest rank, in the units of the costs.

    V3 Table 2; the DualPipe repository for DualPipeV.
    """
    if kind == "1F1B":
        return (ranks - 1) * (F + B)
    if kind == "ZB1P":
        return (ranks - 1) * (F + B - 2 * W)
    if kind == "DualPipe":
        return (ranks / 2 - 1) * (FB + B - 3 * W)
    need(kind == "DualPipeV", "kind", kind, "use 1F1B, ZB1P, DualPipe or DualPipeV")
    return (ranks - 1) * (FB + B - 3 * W)
