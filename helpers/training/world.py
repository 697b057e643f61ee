"""Who this process is among those that train together.

A process that torchrun did not start is alone, and `World` changes nothing of what it
does. Those that it started are `helpers.training.distributed.TorchrunWorld`s.
"""

from helpers.checks import need
from helpers.v3 import DeepSeekV3

import torch
from torch import Tensor


class World:
    """One process alone; also what every training may ask of several.

    `rank` is the number of this process (0 prints and writes), `size` how many there
    are. `exchange_seconds` is the time spent in all-to-alls so far, with the waiting.
    """

    rank = 0
    size = 1
    exchange_seconds = 0.0

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Change `tensor` to its sum over all processes; -> the same tensor."""
        return tensor

    def mean(self, *values: float) -> list[float]:
        """The mean of each value over all processes."""
        return [float(value) for value in values]

    def agree(self, number: int) -> bool:
        """Whether all processes pass the same number; they wait for each other."""
        return True

    def rows(self, batch: Tensor, name: str) -> Tensor:
        """This process's part of the rows that all have.

        Raises ValueError with the setting's `name` when they do not divide.
        """
        need(
            len(batch) % self.size == 0,
            name,
            len(batch),
            f"it must be a multiple of the number of processes, {self.size}",
        )
        return batch.chunk(self.size)[self.rank]

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor of which a part is here, on the first process.

        All must ask at once; the others get a tensor on the meta device.
        """
        return tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The part of a full tensor that belongs here when it is split as `like` is."""
        return tensor.to(like.device)

    def shard(self, model: DeepSeekV3, ep: int | None = None) -> DeepSeekV3:
        """Change `model`, the same on all processes: it is split among groups of `ep`.

        The default is one group of all. Raises ValueError where that does not divide.
        """
        if ep is None:
            ep = self.size
        experts = model.config.n_routed_experts
        has_experts = len(model.routers()) > 0
        divides = ep >= 1 and self.size % ep == 0
        if has_experts:
            divides = divides and experts % ep == 0
        need(
            divides,
            "ep",
            ep,
            f"it must divide the number of processes, {self.size}, and "
            f"n_routed_experts={experts}",
        )
        return self._split(model, ep)

    def _split(self, model: DeepSeekV3, ep: int) -> DeepSeekV3:
        return model

    def leave(self, code: int = 0) -> None:
        """End this program with `code`; one alone that went well goes on."""
        if code:
            raise SystemExit(code)
