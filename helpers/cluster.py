"""A cluster on paper: the traffic of a routing over two kinds of links, pipeline schedules with a simulator, and expert placement (EPLB)."""
import heapq
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# What one H800 of a node of 8 gets out of its links under DeepEP's kernels, bytes/s: notebook 07 fits both to the published table
NVLINK, INFINIBAND = 155e9, 44e9
Part = tuple[str, int, int]  # (F, B = I + W, I = gradient of the input or W = of the weights; stage; micro-batch)
Cell = tuple[Part, ...]  # one part, or a forward and a backward that overlap


def _need(ok: bool, right: str, **field: object) -> None:
    if not ok:
        raise ValueError(", ".join(f"{name}={value!r}" for name, value in field.items()) + f" cannot work: {right}")


class Reach(NamedTuple):
    """Means over tokens of the places that must get a copy, and how far the busiest place lies above the mean (max / mean)."""
    nodes: float
    remote: float  # nodes other than the token's own: copies over InfiniBand
    ranks: float  # GPUs, its own included: copies over NVLink, those forwarded after InfiniBand too
    busiest_node: float
    busiest_rank: float


def reach(index: Tensor, experts: int, ranks: int, per_node: int = 8) -> Reach:
    """Where the tokens of index [N, K] (chosen experts) must go when `experts` lie in order on `ranks` GPUs, `per_node` to a node.
    The tokens start evenly from all ranks, in order. One copy a node crosses InfiniBand and is forwarded inside it (V3 section 3.2.2)."""
    _need(ranks > 0 and experts % ranks == 0, f"the {experts} experts must divide evenly over the ranks", ranks=ranks)
    _need(per_node > 0 and ranks % per_node == 0, f"it must divide ranks={ranks}", per_node=per_node)
    rows = torch.arange(len(index))
    hit = torch.zeros(len(index), ranks).scatter_(1, index // (experts // ranks), 1.0)
    node = hit.unflatten(1, (-1, per_node)).amax(dim=-1)
    remote = node.clone()
    remote[rows, rows * ranks // len(index) // per_node] = 0.0
    busiest = [(load.max() / load.mean().clamp(min=1e-9)).item() for load in (remote.sum(0), hit.sum(0))]
    return Reach(*((part.sum() / len(index)).item() for part in (node, remote, hit)), *busiest)


def all_to_all(tokens: int, to: Reach, size: float, nvlink: float = NVLINK, infiniband: float = INFINIBAND) -> tuple[float, float]:
    """Seconds on (NVLink, InfiniBand) to send `tokens` per GPU of `size` bytes each; both run at once, so the longer one counts."""
    for name, value in {"nvlink": nvlink, "infiniband": infiniband, "size": size}.items():
        _need(0 < value < float("inf"), "it must be a finite number above 0", **{name: value})
    return tokens * to.ranks * size / nvlink, tokens * to.remote * size / infiniband


def _cells(words: Sequence[str], stages: tuple[int, int], first: tuple[int, int] = (0, 0)) -> list[Cell]:
    """Words such as F0, B1, I1, W, F0B1 (letter and phase) as cells. stages, first: stage and first micro-batch of phases 0 and 1."""
    cells, done, waiting = [], Counter(), deque()
    for word in words:
        parts = [(word[i], int(word[i + 1 : i + 2] or 0)) for i in range(0, len(word), 2)]
        cells.append(tuple((k, *waiting.popleft()) if k == "W" else (k, stages[d], first[d] + done[k == "F", d]) for k, d in parts))
        done.update((k == "F", d) for k, d in parts if k != "W")
        waiting.extend(part[1:] for part in cells[-1] if part[0] == "I")
    return cells


def schedule(kind: str, ranks: int, micro_batches: int) -> list[list[Cell]]:
    """What each rank does, in order: kind is 1F1B, ZB1P, DualPipe or DualPipeV (V3 section 3.2.1; github.com/deepseek-ai/DualPipe).
    1F1B and ZB1P have a stage a rank. DualPipe has `ranks` stages too, each on two ranks: half of the micro-batches enter at either end.
    DualPipeV has 2 * ranks stages; each rank holds two, and all micro-batches go down and come back up. ValueError for other kinds and
    sizes: DualPipe needs even numbers and 2 * ranks <= micro_batches, DualPipeV the latter."""
    P, M, V, order = ranks, micro_batches, kind == "DualPipeV", []
    _need(kind in ("1F1B", "ZB1P", "DualPipe", "DualPipeV"), "use 1F1B, ZB1P, DualPipe or DualPipeV", kind=kind)
    _need(P >= 1 and M >= 1, "both must be at least 1", ranks=P, micro_batches=M)
    if not kind.startswith("Dual"):
        for r in range(P):
            backward = [["B0"]] * M if kind == "1F1B" else [["I0"] + ["W"] * (j >= r) for j in range(M)]  # r of the W stay behind
            early = min(P - 1 - r, M)
            both = [["F0"] + b for b in backward[: M - early]] + backward[M - early :]
            order.append(_cells(["F0"] * early + sum(both, []) + ["W"] * min(r, M) * (kind == "ZB1P"), (r, r)))
        return order
    _need(V or (P % 2 == 0 and M % 2 == 0), "DualPipe folds the pipeline and feeds both ends, so both must be even", ranks=P, micro_batches=M)
    _need(M >= 2 * P, f"it must be at least 2 * ranks = {2 * P}", micro_batches=M)
    H, half = (P, M) if V else (P // 2, M // 2)
    for r in range(P):
        h = r if V else min(r, P - 1 - r)  # 0 at the ends, H - 1 in the middle
        out, n = H - h - 1, h + 1
        words = ["F0"] * 2 * out + ["F0", "F1"] * n + ["I1", "W", "F1"] * out
        words += (["F0", "B1"] if out == 0 else ["F0B1"]) + ["F1B0"] + ["F0B1", "F1B0"] * (half - 2 * H + h) + ["B1", "F1B0"] * out
        split = n // 2 * 2 + (h + 1) % 2  # of these 2n backwards, the first so many are whole
        words += [("B" if j < split else "I") + "10"[j % 2] for j in range(2 * n)] + ["W", "I0"] * out + ["W"] * n
        down, up = (r, 0), (2 * H - 1 - r, 0 if V else half)  # (stage, first micro-batch) of the two phases
        order.append(_cells(words, *zip(*((down, up) if V or r < H else (up, down)), strict=True)))
    return order


class Timeline(NamedTuple):
    """When everything happens, in the units of the costs: one entry per rank, and of `cells` per cell (cell, start, end)."""
    span: float
    busy: list[float]
    cells: list[list[tuple[Cell, float, float]]]
    peak: list[int]  # most micro-batches whose activations a rank holds: forward begun, gradient of the weights not done


def simulate(order: list[list[Cell]], F: float = 1, B: float = 2, W: float = 1, FB: float = 3) -> Timeline:
    """Run each rank's cells in order, each as soon as its rank is free and its inputs are there; sending takes no time of its own.
    Costs of a forward, a whole backward, its part W for the weights, and an overlapped pair. ValueError for an order that cannot end."""
    _need(min(F, W, B - W, FB) > 0, "all must be above 0, and W below B", F=F, B=B, W=W, FB=FB)
    cost, last = {"F": F, "B": B, "I": B - W, "W": W}, max(stage for rank in order for cell in rank for _, stage, _ in cell)
    ends: dict[tuple[str, int, int], float] = {}
    done: list[list[tuple[Cell, float, float]]] = [[] for _ in order]
    while sum(map(len, done)) < sum(map(len, order)):
        before = len(ends)
        for d, rank in zip(done, order, strict=True):
            for cell in rank[len(d) :]:
                inputs = []
                for kind, s, m in cell:
                    inputs += [("F", s - 1, m)] * (kind == "F" and s > 0) + [("B", s, m)] * (kind == "W")
                    inputs += ([("F", s, m)] + [("B", s + 1, m)] * (s < last)) if kind in "BI" else []
                if not all(i in ends for i in inputs):
                    break
                start = max([d[-1][2] if d else 0.0, *(ends[i] for i in inputs)])
                end = start + (FB if len(cell) == 2 else cost[cell[0][0]])
                ends |= {("B" if kind == "I" else kind, s, m): end for kind, s, m in cell}
                d.append((cell, start, end))
        _need(len(ends) > before, "every rank waits for another one", order="this one")
    busy = [sum(end - start for _, start, end in d) for d in done]
    peak = [int(np.cumsum([[sum(k == "F" for k, *_ in c), -sum(k in "BW" for k, *_ in c)] for c in rank]).max()) for rank in order]
    return Timeline(max(d[-1][2] for d in done), busy, done, peak)


def bubble(kind: str, ranks: int, F: float, B: float, W: float, FB: float) -> float:
    """Published idle time of the idlest rank (V3 Table 2; the DualPipe repository for DualPipeV), in the units of the costs."""
    return {"1F1B": (ranks - 1) * (F + B), "ZB1P": (ranks - 1) * (F + B - 2 * W), "DualPipe": (ranks / 2 - 1) * (FB + B - 3 * W),
            "DualPipeV": (ranks - 1) * (FB + B - 3 * W)}[kind]


def balanced_packing(weight: np.ndarray, packs: int) -> np.ndarray:
    """weight [L, n] -> slot of each item [L, n]: heaviest first into the lightest pack with room; pack p begins at slot p * n / packs."""
    _need(packs > 0 and weight.shape[1] % packs == 0, f"it must divide the {weight.shape[1]} items", packs=packs)
    size, slot = weight.shape[1] // packs, np.empty(weight.shape, dtype=int)
    for row, place in zip(weight, slot, strict=True):
        lightest = [(0.0, p, 0) for p in range(packs)]  # load, pack, items in it
        for item in np.argsort(-row, kind="stable"):
            load, p, filled = heapq.heappop(lightest)
            place[item] = p * size + filled
            if filled + 1 < size:
                heapq.heappush(lightest, (load + row[item], p, filled + 1))
    return slot


def replicate(weight: np.ndarray, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """weight [L, n] -> (expert of each replica [L, replicas], replicas of each expert [L, n]): copy the heaviest replica again and again."""
    rows, n = np.arange(len(weight)), weight.shape[1]
    _need(replicas >= n, f"every one of the {n} experts needs a place", replicas=replicas)
    expert, count = np.tile(np.arange(replicas), (len(weight), 1)), np.ones(weight.shape, dtype=int)
    for i in range(n, replicas):
        expert[:, i] = (weight / count).argmax(axis=1)
        count[rows, expert[:, i]] += 1
    return expert, count


class Placement(NamedTuple):
    """slots [L, R]: the expert in each slot, R / gpus slots a GPU in order. count [L, E]. where [L, E, most]: an expert's slots, then -1."""
    slots: np.ndarray
    count: np.ndarray
    where: np.ndarray

    def loads(self, weight: np.ndarray, gpus: int) -> np.ndarray:
        """Load of each GPU [L, gpus] when an expert's tokens (weight [L, E]) are shared evenly by its replicas."""
        return np.take_along_axis(weight / self.count, self.slots, 1).reshape(len(weight), gpus, -1).sum(-1)


def place_experts(weight: np.ndarray, replicas: int, gpus: int, nodes: int = 1, groups: int = 1) -> Placement:
    """EPLB (github.com/deepseek-ai/EPLB) for expert loads weight [L, E]: groups of experts to nodes, copies, copies to GPUs.
    If the nodes do not divide the groups, it places globally, as one node with one group. ValueError for what does not divide."""
    weight = np.asarray(weight, dtype=float)
    _need(weight.ndim == 2 and bool(np.isfinite(weight).all()) and weight.min(initial=0) >= 0, "use loads [L, E] of at least 0", weight=weight.shape)
    L, E = weight.shape
    if nodes > 0 and groups % nodes:
        nodes = groups = 1
    for name, part, whole, of in (("groups", groups, E, "experts"), ("nodes", nodes, gpus, "gpus"), ("gpus", gpus, replicas, "replicas")):
        _need(part > 0 and whole % part == 0, f"it must divide {of}={whole}", **{name: part})
    members = np.arange(E).reshape(groups, -1)
    near = members[balanced_packing(weight.reshape(L, groups, -1).sum(-1), nodes).argsort(1)].reshape(L * nodes, -1)  # experts by node
    local = np.take_along_axis(weight.repeat(nodes, 0), near, 1)
    expert, copies = replicate(local, replicas // nodes)
    slot = balanced_packing(np.take_along_axis(local / copies, expert, 1), gpus // nodes)
    slots = np.take_along_axis(near, np.take_along_axis(expert, slot.argsort(1), 1), 1).reshape(L, replicas)
    count = np.stack([np.bincount(row, minlength=E) for row in slots])
    where = np.full((L, E, count.max()), -1)
    where[np.arange(where.shape[-1]) < count[..., None]] = slots.argsort(1, kind="stable").ravel()
    return Placement(slots, count, where)
