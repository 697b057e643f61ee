"""One training on all processes that torchrun started: tokens go to their experts by all-to-all (V3 section 3.2), the rest is split by FSDP2."""
import os
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.model import DeepSeekV3, Experts, MoE, _Combine, _Dispatch

ON = "TORCHELASTIC_RUN_ID" in os.environ  # without torchrun a process is alone, and nothing here changes what it does
RANK, N = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if ON else (0, 1)  # number of this process (0 prints and writes), of how many
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if ON:  # these take as long to import as torch
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def join() -> None:
    """Meet the other processes (gloo on CPUs, nccl on GPUs), also anew after one was killed."""
    if ON:
        kept = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"  # it outlives an attempt, with the addresses of the dead: one prefix each
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), N, is_master=RANK == 0 and not kept)
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"] if kept else "", store)
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=store, rank=RANK, world_size=N)


def leave() -> None:
    """End a process that joined."""
    if ON:
        dist.destroy_process_group()
        os._exit(0)  # what DTensor's collectives leave behind can abort an ordinary exit


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if ON:
        dist.all_reduce(tensor)
    return tensor


def mean(*values: float) -> list[float]:
    """The mean of each value over all processes."""
    return (total(torch.tensor(values, dtype=torch.float64, device=DEVICE if ON else "cpu")) / N).tolist()


def rows(batch: Tensor, name: str) -> Tensor:
    """This process's part of the rows that all have. ValueError, with the setting's `name`, when they do not divide."""
    if len(batch) % N:
        raise ValueError(f"{name}={len(batch)} cannot work: it must be a multiple of the number of processes, {N}")
    return batch.chunk(N)[RANK]


class AllToAll(torch.autograd.Function):
    """x [sum(sent), ...] -> [sum(got), ...]: sent[i] rows to process i, got[i] rows from it; the gradient goes the way back."""
    seconds = 0.0  # spent here by this process, waiting for others included

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back, out, wait = (got, sent, group), x.new_empty(sum(got), *x.shape[1:]), torch.get_device_module(x.device).synchronize
        began = wait() or time.perf_counter()
        dist.all_to_all_single(out, x.contiguous(), got, sent, group=group)
        AllToAll.seconds += (wait() or time.perf_counter()) - began
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, *ctx.back), None, None, None


class ParallelExperts(Experts):
    """E / ep consecutive experts of a layer on each of ep processes; the numbers are those of `Experts`, bit for bit."""

    def __init__(self, experts: Experts, mesh: dist.DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.precision = experts.precision
        self.group, groups = mesh.get_group("ep"), mesh.get_group("copies")  # each group sums gradients of its own tokens; the loss is a mean over N
        for name, weight in experts.named_parameters():
            setattr(self, name, nn.Parameter(distribute_tensor(weight.detach(), mesh, (Replicate(), Shard(0)), src_data_rank=None).clone()))
            getattr(self, name).register_post_accumulate_grad_hook(lambda w: dist.all_reduce(w.grad.to_local().div_(N), group=groups))

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [N, H], weights and index [N, K] of this process's tokens -> [N, H]. Rows leave sorted by expert, come by process, then expert."""
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        k, ep, order = index.shape[-1], self.group.size(), index.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        counts = torch.bincount(index.flatten(), minlength=len(self.down_proj)).view(ep, -1)
        asked = AllToAll.apply(counts, [1] * ep, [1] * ep, self.group)  # [ep, E / ep]: rows from each process for each expert here
        sent, got = counts.sum(dim=1).tolist(), asked.sum(dim=1).tolist()
        x = AllToAll.apply(_Dispatch.apply(x, order, place, k), sent, got, self.group)
        weights = AllToAll.apply(weights.flatten().index_select(0, order), sent, got, self.group)
        expert = torch.arange(asked.numel(), device=x.device).repeat_interleave(asked.flatten()) % asked.shape[1]
        here = SimpleNamespace(precision=self.precision, **{name: weight.to_local() for name, weight in self.named_parameters()})
        out = Experts.forward(here, x, weights.unsqueeze(-1), expert.unsqueeze(-1))  # sorted by expert anew: the order of the global batch
        return _Combine.apply(AllToAll.apply(out, got, sent, self.group), order, place, k)


def shard(model: DeepSeekV3, ep: int | None = None) -> DeepSeekV3:
    """Split `model`, the same on all processes, among groups of `ep` (default: one group of all). ValueError when that does not divide."""
    ep, experts, layers = N if ep is None else ep, model.config.n_routed_experts, [m for m in model.modules() if isinstance(m, MoE)]
    if ep < 1 or N % ep or (layers and experts % ep):
        raise ValueError(f"ep={ep} cannot work: it must divide the number of processes, {N}, and n_routed_experts={experts}")
    if ON:
        mesh = dist.init_device_mesh(DEVICE, (N // ep, ep), mesh_dim_names=("copies", "ep"))
        for moe in layers:
            moe.experts, moe.gate.pool = ParallelExperts(moe.experts, mesh), lambda counts: total(counts.clone()) / N
        for module in (*model.layers, *model.mtp, model.embed_tokens, model.norm, model.lm_head, model):
            fully_shard(module, mesh=mesh, ignored_params={p for moe in layers for p in moe.experts.parameters()})
        register_fsdp_forward_method(model, "hidden")
    return model


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of which a part is here, on process 0; all must ask at once."""
    return tensor.full_tensor().to("meta" if RANK else "cpu") if ON and isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that belongs here when it is split as `like` is; a number is not split."""
    tensor, split = tensor.to(like.device), ON and isinstance(like, DTensor) and tensor.dim() > 0
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone() if split else tensor
