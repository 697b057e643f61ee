"""Expert placement: which GPU holds which experts, and copies of popular ones.

The rules are those of EPLB (github.com/deepseek-ai/EPLB). Shapes: L layers, E experts,
R replicas (slots for experts on all GPUs together).
"""

import heapq
from dataclasses import dataclass

from helpers.checks import Count, check, need

import numpy as np


@dataclass(frozen=True)
class Placement:
    """Where the replicas of L layers are."""

    slots: np.ndarray  # [L, R] the expert in each slot, R / gpus slots a GPU in order
    count: np.ndarray  # [L, E] replicas of each expert
    where: np.ndarray  # [L, E, most] slots of each expert, then -1

    def loads(self, weight: np.ndarray, gpus: int) -> np.ndarray:
        """Load of each GPU [L, gpus].

        An expert's tokens (weight [L, E]) are shared evenly by its replicas. Raises
        InputError for loads of another shape and for GPUs that do not divide R.
        """
        expected = self.count.shape
        need(weight.shape == expected, "weight", weight.shape, f"use loads {expected}")
        _check_divides("gpus", gpus, "replicas", self.slots.shape[1])
        of_replica = np.take_along_axis(weight / self.count, self.slots, 1)
        return of_replica.reshape(len(weight), gpus, -1).sum(-1)


def balanced_packing(weight: np.ndarray, packs: int) -> np.ndarray:
    """weight [L, n] -> slot of each item [L, n]; pack p begins at slot p * n / packs.

    Heaviest item first, into the lightest pack that has room. Raises InputError for
    packs that do not divide the items.
    """
    _check_loads(weight)
    items = weight.shape[1]
    _check_divides("packs", packs, "items", items)
    size = items // packs
    slot = np.empty(weight.shape, dtype=int)
    for row, place in zip(weight, slot, strict=True):
        open_packs = [(0.0, pack, 0) for pack in range(packs)]  # load, pack, items
        for item in np.argsort(-row, kind="stable"):
            load, pack, filled = heapq.heappop(open_packs)
            place[item] = pack * size + filled
            if filled + 1 < size:
                heapq.heappush(open_packs, (load + row[item], pack, filled + 1))
    return slot


def replicate(weight: np.ndarray, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Copy the heaviest replica again and again.

    weight [L, n] -> the expert of each replica [L, replicas], and how many replicas
    each expert has [L, n]. Raises InputError for fewer replicas than experts.
    """
    _check_loads(weight)
    check("replicas", replicas, Count)
    layers, experts = weight.shape
    need(
        replicas >= experts,
        "replicas",
        replicas,
        f"every one of the {experts} experts needs a place",
    )
    rows = np.arange(layers)
    expert = np.tile(np.arange(replicas), (layers, 1))
    count = np.ones(weight.shape, dtype=int)
    for i in range(experts, replicas):
        heaviest = (weight / count).argmax(axis=1)
        expert[:, i] = heaviest
        count[rows, heaviest] += 1
    return expert, count


def place_experts(
    weight: np.ndarray, replicas: int, gpus: int, nodes: int = 1, groups: int = 1
) -> Placement:
    """Place experts with loads weight [L, E]: groups to nodes, copies, copies to GPUs.

    If the nodes do not divide the groups, it places globally, as one node with one
    group. As in the published code, two copies of an expert may come to lie on one GPU:
    nothing in the packing forbids it. Raises InputError for what does not divide.
    """
    weight = np.asarray(weight, dtype=float)
    _check_loads(weight)
    layers, experts = weight.shape
    check("nodes", nodes, Count)
    check("groups", groups, Count)
    if groups % nodes:
        nodes = 1
        groups = 1
    _check_divides("groups", groups, "experts", experts)
    _check_divides("nodes", nodes, "gpus", gpus)
    _check_divides("gpus", gpus, "replicas", replicas)

    # groups to nodes: the experts of each node, [L * nodes, E / nodes]
    members = np.arange(experts).reshape(groups, -1)
    group_load = weight.reshape(layers, groups, -1).sum(-1)
    by_node = balanced_packing(group_load, nodes).argsort(1)
    near = members[by_node].reshape(layers * nodes, -1)

    # copies of the popular ones, within each node
    local = np.take_along_axis(weight.repeat(nodes, 0), near, 1)
    expert, copies = replicate(local, replicas // nodes)

    # copies to the GPUs of the node
    of_copy = np.take_along_axis(local / copies, expert, 1)
    in_slot = balanced_packing(of_copy, gpus // nodes).argsort(1)
    local_slots = np.take_along_axis(expert, in_slot, 1)
    slots = np.take_along_axis(near, local_slots, 1).reshape(layers, replicas)
    return _with_lookup(slots, experts)


def _check_loads(weight: np.ndarray) -> None:
    good = weight.ndim == 2 and weight.size > 0
    good = good and bool(np.isfinite(weight).all()) and weight.min() >= 0
    need(good, "weight", weight.shape, "use loads [L, E] of at least 0")


def _check_divides(name: str, part: int, whole_name: str, whole: int) -> None:
    check(name, part, Count)
    need(whole % part == 0, name, part, f"it must divide {whole_name}={whole}")


def _with_lookup(slots: np.ndarray, experts: int) -> Placement:
    """The placement with, for each expert, how many slots it has and which."""
    count = np.stack([np.bincount(row, minlength=experts) for row in slots])
    most = count.max()
    where = np.full((len(slots), experts, most), -1)
    taken = np.arange(most) < count[..., None]
    where[taken] = slots.argsort(1, kind="stable").ravel()
    return Placement(slots, count, where)
