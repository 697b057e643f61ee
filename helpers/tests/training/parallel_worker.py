"""What test_parallel.py lets several processes do; there is no pytest in here.

torchrun --nproc-per-node 4 -m helpers.tests.training.parallel_worker FOLDER
"""

import copy
import json
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from helpers.training import corpus as text
from helpers.training import pretrain, runs
from helpers.training.distributed import ParallelExperts, TorchrunWorld
from helpers.training.loop import Stopped, adamw
from helpers.training.parallel import join_world
from helpers.training.pretrain import Settings
from helpers.v3 import DeepSeekV3, Experts, V3Config, fp8

import torch
import torch.distributed as dist
from torch import Tensor


def drawn(config: V3Config) -> DeepSeekV3:
    torch.manual_seed(0)
    return DeepSeekV3(config).train()


class Checks:
    """The checks of one process; all processes make the same ones."""

    def __init__(self, world: TorchrunWorld) -> None:
        self.world = world

    def same(self, alone: Tensor, mine: Tensor, ep: int) -> None:
        """Bit for bit where each expert sees the rows of all processes.

        With more groups it sees fewer at once, and sums may be in another order.
        """
        if ep == self.world.size:
            assert torch.equal(alone, mine)
        else:
            assert torch.allclose(alone, mine, rtol=1e-5, atol=1e-7)

    def layer(
        self,
        config: V3Config,
        ep: int,
        only: Iterable[int] = (),
        recipe: fp8.Recipe | None = None,
    ) -> None:
        """One MoE layer, all processes together against this process alone.

        The experts are compared bit for bit, output and all gradients. `only`: the
        experts that get any token. Router and shared experts see fewer rows at once,
        where a matrix product may sum in another order.
        """
        world = self.world
        n = world.size
        model = drawn(config)
        if recipe is not None:
            fp8.convert(model, recipe)
        whole = model.layers[-1].mlp
        if only:
            whole.gate.e_score_correction_bias[:] = -1e3
            whole.gate.e_score_correction_bias[list(only)] = 0.0
        spread = copy.deepcopy(whole)
        mesh = dist.init_device_mesh(
            "cpu", (n // ep, ep), mesh_dim_names=("copies", "ep")
        )
        spread.experts = ParallelExperts(whole.experts, mesh, world)
        x, pull = torch.randn(2, n, 6, config.hidden_size).unbind()
        with torch.no_grad():
            routing = whole.gate(x)
        assert routing.load().sum() == n * 6 * config.num_experts_per_tok
        if only:
            assert set(routing.chosen.unique().tolist()) <= set(only)

        def passed(experts: Experts, cut: Callable[[Tensor], Tensor]) -> list[Tensor]:
            """Output of the experts, gradients of their inputs."""
            rows = cut(x.flatten(0, 1)).clone().requires_grad_()
            weights = cut(routing.weights).clone().requires_grad_()
            out = experts(rows, weights, cut(routing.chosen))
            out.backward(cut(pull.flatten(0, 1)))
            return [out.detach(), rows.grad, weights.grad]

        alone = passed(whole.experts, lambda tensor: tensor)
        before = world.exchange_seconds
        mine = passed(spread.experts, lambda tensor: world.rows(tensor, "x"))
        assert world.exchange_seconds > before
        for expected, found in zip(alone, mine, strict=True):
            self.same(world.rows(expected, "rows"), found, ep)
        place = mesh["ep"].get_local_rank()
        for name, weight in spread.experts.named_parameters():
            expected = getattr(whole.experts, name).grad.chunk(ep)[place] / n
            self.same(expected, weight.grad.to_local(), ep)
        out, mine_routed = spread(world.rows(x, "x"))
        expected, _ = whole(x)
        if recipe is None:
            torch.testing.assert_close(out, world.rows(expected, "x"))
        assert torch.equal(mine_routed.chosen, world.rows(routing.chosen, "x"))

    def gradients(self, config: V3Config, ep: int) -> None:
        """The sharded model against the whole one.

        Losses, loads, clipped gradients, an optimizer step; parts put together again.
        """
        world = self.world
        whole = drawn(config)
        sharded = world.shard(drawn(config), ep)
        held = sum(p.to_local().numel() for p in sharded.parameters())
        [mean_held] = world.mean(held)
        assert mean_held * ep == sum(p.numel() for p in whole.parameters())

        tokens = torch.randint(0, config.vocab_size, (world.size, 17))
        settings = Settings(alpha=0.1)

        def pool(counts: Tensor) -> Tensor:
            return world.total(counts.clone()) / world.size

        def backward(model: DeepSeekV3, rows: Tensor, **more) -> pretrain.Losses:
            found = pretrain.losses(model, rows, **more)
            main, mtp, balance, _ = found
            (main + 0.3 * mtp + settings.alpha * balance).backward()
            return found

        expected = backward(whole, tokens)
        found = backward(sharded, world.rows(tokens, "tokens"), pool=pool)
        norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
        means = world.mean(*(loss.item() for loss in found[:3]))
        for mine, loss in zip(means, expected[:3], strict=True):
            assert abs(mine - loss.item()) <= 1e-6 * loss.item()
        for mine, theirs in zip(found.routings, expected.routings, strict=True):
            load = mine.load()
            assert load.sum() > 0
            assert torch.equal(world.total(load), theirs.load())

        optimizer = adamw(sharded, settings)
        for limit in (2 * norm, norm / 3):
            torch.nn.utils.clip_grad_norm_(whole.parameters(), limit)
            torch.nn.utils.clip_grad_norm_(sharded.parameters(), limit)
            self.all_close_gradients(sharded, whole, ep)
        for name, parameter in sharded.named_parameters():
            full = torch.randn(whole.get_parameter(name).shape)
            again = world.whole(world.part(full, parameter))
            if world.first:
                assert torch.equal(again, full), name
        optimizer.step()  # a fused step takes all kinds of shards

    def all_close_gradients(
        self, sharded: DeepSeekV3, whole: DeepSeekV3, ep: int
    ) -> None:
        for name, parameter in sharded.named_parameters():
            gathered = self.world.whole(parameter.grad)
            expected = whole.get_parameter(name).grad
            size = expected.abs().max().item()
            if self.world.first:
                close = torch.allclose(gathered, expected, rtol=1e-4, atol=1e-6 * size)
                assert close, (name, ep)

    def agreement(self) -> None:
        """All agree on a number only when it is the same one, wherever it differs."""
        world = self.world
        largest = 2**48 - 1
        assert world.agree(largest)
        for odd in range(world.size):
            for difference in (-1, 1):
                mine = largest // 2
                if world.rank == odd:
                    mine += difference
                assert not world.agree(mine)
        # the first process has the mean of all; it must hear of the others too
        mine = (0, 1, -1, 0)[world.rank]
        assert world.mean(mine) == [0]
        assert not world.agree(mine)


def refused(act: Callable[[], object], *words: str) -> None:
    try:
        act()
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"no ValueError with {words}")


def refusals(
    world: TorchrunWorld, config: V3Config, settings: Settings, corpus: text.Corpus
) -> None:
    size = str(world.size)
    odd = config.with_(n_routed_experts=6, n_group=2)
    refused(lambda: world.shard(drawn(config), 3), "ep=3", size)
    refused(lambda: world.shard(drawn(odd)), f"ep={size}", "n_routed_experts=6")
    refused(lambda: world.shard(drawn(config), 0), "ep=0")

    def train(changed: Settings) -> None:
        model = world.shard(drawn(config))
        pretrain.train(model, corpus, changed, world=world)

    for name in ("batch_size", "valid_sequences"):
        wrong = replace(settings, **{name: world.size + 1})
        said = f"{name}={world.size + 1}"
        refused(lambda wrong=wrong: train(wrong), said, "multiple")
    refused(lambda: train(replace(settings, seed=world.rank)), "do not see the same")


def stopped_at(world: TorchrunWorld, corpus: text.Corpus, step: int) -> text.Corpus:
    """A copy of the corpus that brings Ctrl-C to one process at this step's batch."""
    batch = corpus.batch
    last = world.rank == world.size - 1

    def hooked(asked: int, *sizes: int) -> Tensor:
        if asked == step and last:
            signal.raise_signal(signal.SIGINT)
        return batch(asked, *sizes)

    stopping = copy.copy(corpus)
    stopping.batch = hooked
    return stopping


def runs_of_several(
    world: TorchrunWorld,
    folder: Path,
    config: V3Config,
    settings: Settings,
    corpus: text.Corpus,
) -> None:
    """A whole run, one handed over by a process alone, one found by other code."""

    def train(name: str, ep: int, corpus: text.Corpus = corpus) -> pretrain.History:
        model = world.shard(drawn(config), ep)
        out = folder / name
        return pretrain.train(model, corpus, settings, out, label="", world=world)

    history = train("spread", 2)
    # the same numbers, found with another hash: they are compared, and reused
    code = runs.code_hash
    runs.code_hash = lambda module: "other"
    again = train("spread", world.size)
    runs.code_hash = code
    assert again["provenance"]["compared"] == "other"
    assert again["loss"] == history["loss"]

    try:
        train("moved", world.size, stopped_at(world, corpus, 13))
    except Stopped as stopped:
        if world.first:
            print(stopped, flush=True)
        return
    raise AssertionError("not stopped")


def main(world: TorchrunWorld) -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = V3Config.from_hf(job["config"])
    settings = Settings(**job["settings"])
    corpus = text.load(job["texts"], config.vocab_size)

    checks = Checks(world)
    checks.agreement()
    for ep in (world.size, 2):
        checks.layer(config, ep)
    # the first and last process of four get no row at all
    checks.layer(config, world.size, only=range(2, 6))
    checks.layer(config, world.size, recipe=fp8.Recipe())
    checks.gradients(config, world.size)
    checks.gradients(config.with_(seq_aux=False, num_nextn_predict_layers=0), 2)
    # nothing divides by 4
    odd = config.with_(n_routed_experts=6, n_group=2, hidden_size=25)
    checks.gradients(odd, 1)
    refusals(world, config, settings, corpus)
    runs_of_several(world, folder, config, settings, corpus)


if __name__ == "__main__":
    joined = join_world()
    assert isinstance(joined, TorchrunWorld)
    main(joined)
    joined.leave()
