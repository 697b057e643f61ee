"""A cluster on paper, as V3 used one (V3 sections 3.2 to 3.4).

links      the traffic of a routing over two kinds of links
schedules  what each rank of a pipeline does, in order; `timeline` simulates it
placement  where the experts go, and how many copies of each (EPLB)

Imports from `helpers.checks` only.
"""

from helpers.cluster.links import INFINIBAND, NVLINK, Reach, all_to_all, reach
from helpers.cluster.placement import (
    Placement,
    balanced_packing,
    place_experts,
    replicate,
)
from helpers.cluster.schedules import Cell, Part, schedule
from helpers.cluster.timeline import Timeline, bubble, simulate

__all__ = [
    "INFINIBAND",
    "NVLINK",
    "Cell",
    "Part",
    "Placement",
    "Reach",
    "Timeline",
    "all_to_all",
    "balanced_packing",
    "bubble",
    "place_experts",
    "reach",
    "replicate",
    "schedule",
    "simulate",
]
