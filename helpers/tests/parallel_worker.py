"""What test_parallel.py lets several processes do: torchrun --nproc-per-node 4 -m helpers.tests.parallel_worker FOLDER (no pytest in here)."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from helpers import data, parallel, train
from helpers.model import DeepSeekV3, V3Config

rank, n = parallel.RANK, parallel.N


def drawn(config):
    torch.manual_seed(0)
    return DeepSeekV3(config).train()


def same(a, b, ep):
    """Bit for bit where each expert sees the rows of all processes; with more groups it sees fewer at once, and sums may be in another order."""
    assert torch.equal(a, b) if ep == n else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def check_layer(config, ep, only=None):
    """One MoE layer, all processes together against this process alone: the experts bit for bit, output and all gradients. `only`: the
    experts that get any token. Router and shared experts see fewer rows at once, where a matrix product may sum in another order."""
    whole = drawn(config).layers[-1].mlp
    if only:
        whole.gate.e_score_correction_bias[:] = -1e3
        whole.gate.e_score_correction_bias[list(only)] = 0.0
    spread = copy.deepcopy(whole)
    mesh = dist.init_device_mesh("cpu", (n // ep, ep), mesh_dim_names=("copies", "ep"))
    spread.experts = parallel.ParallelExperts(whole.experts, mesh)
    x, pull = torch.randn(2, n, 6, config.hidden_size).unbind()
    with torch.no_grad():
        weights, index = whole.gate(x)
    assert whole.gate.load.sum() == n * 6 * config.num_experts_per_tok and (
        only is None or set(index.unique().tolist()) <= set(only)
    )
    result = []
    for experts, cut in (
        (whole.experts, lambda tensor: tensor),
        (spread.experts, lambda tensor: parallel.rows(tensor, "x")),
    ):
        rows, w = (
            cut(tensor).clone().requires_grad_()
            for tensor in (x.flatten(0, 1), weights)
        )
        out = experts(rows, w, cut(index))
        out.backward(cut(pull.flatten(0, 1)))
        result.append([out.detach(), rows.grad, w.grad])
    for alone, mine in zip(*result, strict=True):
        same(parallel.rows(alone, "rows"), mine, ep)
    for name, weight in spread.experts.named_parameters():
        same(
            getattr(whole.experts, name).grad.chunk(ep)[mesh["ep"].get_local_rank()]
            / n,
            weight.grad.to_local(),
            ep,
        )
    torch.testing.assert_close(
        spread(parallel.rows(x, "x")), parallel.rows(whole(x), "x")
    )


def check_gradients(config, ep):
    """Losses, loads, clipped gradients and an optimizer step of the sharded model against the whole one's; parts put together again."""
    whole, sharded = drawn(config), parallel.shard(drawn(config), ep)
    held = sum(p.to_local().numel() for p in sharded.parameters())
    assert parallel.mean(held)[0] * ep == sum(p.numel() for p in whole.parameters())
    tokens, settings = (
        torch.randint(0, config.vocab_size, (n, 17)),
        train.Settings(alpha=0.1),
    )
    optimizers = []
    for model, rows in ((whole, tokens), (sharded, parallel.rows(tokens, "tokens"))):
        main, mtp, balance = train.losses(model, rows)
        (main + 0.3 * mtp + settings.alpha * balance).backward()
        optimizers.append(train.adamw(model, settings))
        if model is whole:
            expected = main.item(), mtp.item(), balance.item()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    for a, b in zip(
        parallel.mean(main.item(), mtp.item(), balance.item()), expected, strict=True
    ):
        assert abs(a - b) <= 1e-6 * b
    for a, b in zip(sharded.routers(), whole.routers(), strict=True):
        assert torch.equal(parallel.total(a.load), b.load) and a.load.sum() > 0
    for limit in (2 * norm, norm / 3):
        torch.nn.utils.clip_grad_norm_(whole.parameters(), limit)
        torch.nn.utils.clip_grad_norm_(sharded.parameters(), limit)
        for (name, a), b in zip(
            sharded.named_parameters(), whole.parameters(), strict=True
        ):
            gathered = parallel.whole(a.grad)
            assert rank or torch.allclose(
                gathered, b.grad, rtol=1e-4, atol=1e-6 * b.grad.abs().max().item()
            ), (name, ep)
    for name, p in sharded.named_parameters():
        full = torch.randn(dict(whole.named_parameters())[name].shape)
        again = parallel.whole(parallel.part(full, p))
        assert rank or torch.equal(again, full), name
    optimizers[1].step()  # a fused step takes all kinds of shards


def refused(act, *words):
    try:
        act()
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"no ValueError with {words}")


def stopped_at(corpus, step):
    """The corpus, and Ctrl-C on one process when the batch of this step is asked for."""
    batch = corpus.batch

    def hooked(asked, *args):
        if asked == step and rank == n - 1:
            import signal

            signal.raise_signal(signal.SIGINT)
        return batch(asked, *args)

    corpus.batch = hooked
    return corpus


def main():
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    config, settings = (
        V3Config.from_hf(job["config"]),
        train.Settings(**job["settings"]),
    )
    for ep in (n, 2):
        check_layer(config, ep)
    check_layer(
        config, n, only=range(2, 6)
    )  # the first and last process of four get no row at all
    check_gradients(config, n)
    check_gradients(config.with_(seq_aux=False, num_nextn_predict_layers=0), 2)
    check_gradients(
        config.with_(n_routed_experts=6, n_group=2, hidden_size=25), 1
    )  # nothing divides by 4
    refused(lambda: parallel.shard(drawn(config), 3), "ep=3", str(n))
    refused(
        lambda: parallel.shard(drawn(config.with_(n_routed_experts=6, n_group=2))),
        f"ep={n}",
        "n_routed_experts=6",
    )
    refused(lambda: parallel.shard(drawn(config), 0), "ep=0")
    corpus = data.load(job["texts"], config.vocab_size)
    for name in ("batch_size", "valid_sequences"):
        wrong = replace(settings, **{name: n + 1})
        refused(
            lambda wrong=wrong: train.train(
                parallel.shard(drawn(config)), corpus, wrong
            ),
            f"{name}={n + 1}",
            "multiple",
        )
    refused(
        lambda: train.train(
            parallel.shard(drawn(config)), corpus, replace(settings, seed=rank)
        ),
        "do not see the same",
    )

    train.train(
        parallel.shard(drawn(config), 2), corpus, settings, folder / "spread", label=""
    )
    model = parallel.shard(drawn(config))
    try:
        train.train(model, stopped_at(corpus, 13), settings, folder / "moved", label="")
    except KeyboardInterrupt:
        return
    raise AssertionError("not stopped")


if __name__ == "__main__":
    parallel.join()
    main()
    parallel.leave()
