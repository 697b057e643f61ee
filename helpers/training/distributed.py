"""One training on all processes that torchrun started (V3 section 3.2).

Tokens go to their experts by all-to-all; everything else is split by FSDP2.
"""

import os
import time
from typing import Any

from helpers.training.world import World
from helpers.v3 import DeepSeekV3, Experts, MoE
from helpers.v3.grouped import combine, dispatch, run_experts, sort_by_expert

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


class TorchrunWorld(World):
    """Processes that torchrun started: gloo between CPUs, nccl between GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = int(os.environ["RANK"])
        self.size = int(os.environ["WORLD_SIZE"])
        # torchrun's own store outlives an attempt and keeps the addresses of killed
        # processes: each attempt gets a prefix of its own
        outlives = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if outlives else ""
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.size,
            is_master=self.rank == 0 and not outlives,
        )
        dist.init_process_group(
            "nccl" if self.device == "cuda" else "gloo",
            store=dist.PrefixStore(attempt, store),
            rank=self.rank,
            world_size=self.size,
        )

    def leave(self, code: int = 0) -> None:
        """End this process with `code`."""
        if code == 0:  # others that are still at work would be waited for
            dist.destroy_process_group()
        # what DTensor's collectives leave behind can abort an ordinary exit
        os._exit(code)

    def total(self, tensor: Tensor) -> Tensor:
        """Change `tensor` to its sum over all processes; -> the same tensor."""
        dist.all_reduce(tensor)
        return tensor

    def mean(self, *values: float) -> list[float]:
        """The mean of each value over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return (self.total(tensor) / self.size).tolist()

    def agree(self, number: int) -> bool:
        """Whether all processes pass the same number; they wait for each other."""
        extremes = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        largest, smallest_negated = extremes.tolist()
        return largest == -smallest_negated

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor of which a part is here, on the first process."""
        if not isinstance(tensor, DTensor):
            return tensor
        return tensor.full_tensor().to("cpu" if self.first else "meta")

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The part of a full tensor that belongs here; a number is not split."""
        tensor = tensor.to(like.device)
        if not isinstance(like, DTensor) or tensor.dim() == 0:
            return tensor
        split = distribute_tensor(
            tensor, like.device_mesh, like.placements, src_data_rank=None
        )
        return split.clone()

    def _split(self, model: DeepSeekV3, ep: int) -> DeepSeekV3:
        shape = (self.size // ep, ep)
        mesh = dist.init_device_mesh(
            self.device, shape, mesh_dim_names=("copies", "ep")
        )
        own: set[nn.Parameter] = set()
        for module in list(model.modules()):
            if isinstance(module, MoE):
                module.experts = ParallelExperts(module.experts, mesh, self)
                own.update(module.experts.parameters())
        parts = [*model.layers, *model.mtp, model.embed_tokens, model.norm]
        for module in (*parts, model.lm_head, model):
            fully_shard(module, mesh=mesh, ignored_params=own)
        register_fsdp_forward_method(model, "hidden")
        register_fsdp_forward_method(model, "trunk")
        return model


class _AllToAll(torch.autograd.Function):
    """x [sum(sent), ...] -> [sum(got), ...]; the gradient goes the way back.

    sent[i] rows go to process i, got[i] rows come from it. A plain call inside an
    autograd function: torch's functional collectives, which have a gradient of their
    own, abort some processes at exit on gloo.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], got: list[int], exchange: "Exchange"
    ) -> Tensor:
        ctx.sent = sent
        ctx.got = got
        ctx.exchange = exchange
        return exchange.send(x, sent, got)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = _AllToAll.apply(grad, ctx.got, ctx.sent, ctx.exchange)
        return back, None, None, None


class Exchange:
    """Rows between the processes of one group; the time is added up in `world`."""

    def __init__(self, group: dist.ProcessGroup, world: World) -> None:
        self.group = group
        self.size = group.size()
        self.world = world

    def send(self, x: Tensor, sent: list[int], got: list[int]) -> Tensor:
        """sent[i] rows of x [sum(sent), ...] to process i, got[i] rows from it."""
        synchronize = torch.get_device_module(x.device).synchronize
        out = x.new_empty(sum(got), *x.shape[1:])
        synchronize()
        began = time.perf_counter()
        dist.all_to_all_single(out, x.contiguous(), got, sent, group=self.group)
        synchronize()
        self.world.exchange_seconds += time.perf_counter() - began
        return out

    def move(self, x: Tensor, sent: list[int], got: list[int]) -> Tensor:
        """`send` with a gradient."""
        return _AllToAll.apply(x, sent, got, self)


class ParallelExperts(Experts):
    """E / ep consecutive experts of a layer on each of ep processes.

    The numbers are those of `Experts`, bit for bit.
    """

    def __init__(self, experts: Experts, mesh: dist.DeviceMesh, world: World) -> None:
        nn.Module.__init__(self)
        self.products = experts.products
        self.exchange = Exchange(mesh.get_group("ep"), world)
        copies = mesh.get_group("copies")

        def average(weight: Tensor) -> None:
            """Change the gradient: each group summed over its own tokens only."""
            dist.all_reduce(_here(weight.grad).div_(world.size), group=copies)

        placement = (Replicate(), Shard(0))
        for name, weight in experts.named_parameters():
            split = distribute_tensor(
                weight.detach(), mesh, placement, src_data_rank=None
            )
            parameter = nn.Parameter(split.clone())
            parameter.register_post_accumulate_grad_hook(average)
            setattr(self, name, parameter)

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [BT, H], weights and index [BT, K] of this process's tokens -> [BT, H].

        Rows leave sorted by expert; they come by process, then by expert.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        exchange = self.exchange
        ep = exchange.size
        experts = len(self.down_proj)
        to = sort_by_expert(index, experts)

        # how many rows go to each expert, and how many each process sends to those here
        counts = torch.bincount(index.flatten(), minlength=experts).view(ep, -1)
        asked = exchange.send(counts, [1] * ep, [1] * ep)  # [ep, E / ep]
        sent = counts.sum(dim=1).tolist()
        got = asked.sum(dim=1).tolist()

        # dispatch: the tokens, and the weights of their choices
        rows = exchange.move(dispatch(x, to), sent, got)
        row_weights = weights.flatten().index_select(0, to.order)
        row_weights = exchange.move(row_weights, sent, got)

        # compute: sorted by expert anew, which is the order of the global batch
        local = torch.arange(asked.numel(), device=x.device)
        expert = local.repeat_interleave(asked.flatten()) % asked.shape[1]
        out = run_experts(
            rows,
            row_weights.unsqueeze(-1),
            expert.unsqueeze(-1),
            _here(self.gate_up_proj),
            _here(self.down_proj),
            self.products,
        )

        # combine: back to the tokens, summed over each one's choices
        return combine(exchange.move(out, got, sent), to)


def _here(tensor: Tensor | None) -> Tensor:
    """The part of a distributed tensor that this process holds."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
