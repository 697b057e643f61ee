"""How this process finds those that train with it."""

import os

from helpers.training.world import World

__all__ = ["World", "join_world"]


def join_world() -> World:
    """Meet the processes that torchrun started with this one; without it, alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World()
    # torch.distributed takes as long to import as torch itself
    from helpers.training.distributed import TorchrunWorld

    return TorchrunWorld()
