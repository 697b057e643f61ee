"""The command: `python -m helpers.bench --help`."""

import argparse
import warnings

from helpers.bench.timing import Job, interleaved
from helpers.bench.transformers_rows import make_pair, rows
from helpers.v3 import DeepSeekV3, MoE, V3Config

import torch

EXPERT_COUNTS = (8, 16, 32, 64, 128, 256)
SIDE = 2048  # of the matrices that measure this machine


def matmul_share(
    config: V3Config, rate: float, repeats: int, device: str
) -> tuple[float, float]:
    """GFLOP/s of a matrix product here, and the share of it that training uses.

    `rate` are training tokens per second, at 6 FLOP per active weight.
    """
    a = torch.randn(SIDE, SIDE, device=device)
    b = torch.randn(SIDE, SIDE, device=device)
    seconds = interleaved({"matmul": lambda: a @ b}, repeats)["matmul"]
    gflops = 2 * SIDE**3 / seconds / 1e9
    with torch.device("meta"):
        model = DeepSeekV3(config.with_(num_nextn_predict_layers=0))
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts
    active = -model.embed_tokens.weight.numel()  # a lookup
    for name, parameter in model.named_parameters():
        active += parameter.numel()
        if ".experts." in name:
            active -= int(parameter.numel() * idle)
    return gflops, 6 * active * rate / 1e9 / gflops


def layer_times(
    config: V3Config, tokens: int, repeats: int, device: str
) -> dict[int, float]:
    """Seconds of one MoE layer, forward and backward, for growing numbers of experts.

    Top-k and width are fixed.
    """
    shape = (1, tokens, config.hidden_size)
    x = torch.randn(shape, device=device, requires_grad=True)
    jobs: dict[str, Job] = {}
    for experts in EXPERT_COUNTS:
        groups = (8, 4) if experts >= 64 else (1, 1)
        layer = MoE(
            config.with_(
                n_routed_experts=experts, n_group=groups[0], topk_group=groups[1]
            )
        ).to(device)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)

        def both(layer: MoE = layer) -> None:
            out, _ = layer(x)
            out.square().mean().backward()
            layer.zero_grad()

        jobs[str(experts)] = both
    seconds = interleaved(jobs, repeats)
    return {int(name): value for name, value in seconds.items()}


def main() -> None:
    """Print all rows."""
    parser = argparse.ArgumentParser(prog="python -m helpers.bench")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each job")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="through the single MoE layer"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = V3Config.tiny()
    print(
        f"{device}, {torch.get_num_threads()} threads, float32, V3Config.tiny(), no "
        f"MTP; medians of {args.repeats} interleaved runs"
    )
    found = rows(make_pair(config, device), args.repeats, args.new_tokens)
    title = f"{'tokens/s':44} {'ours':>10} {'transformers':>13} {'ratio':>7}"
    print(f"\n{title}   their fastest experts")
    for name, ours, theirs, best in found:
        ratio = ours / theirs
        print(f"{name:44} {ours:10,.0f} {theirs:13,.0f} {ratio:6.2f}x   {best}")

    gflops, share = matmul_share(config, found[0].ours, args.repeats, device)
    print(
        f"\nmatmul {SIDE}^3: {gflops:,.0f} GFLOP/s; training uses {share:.0%} of it "
        "(6 FLOP per active weight and token, attention left out)"
    )
    times = layer_times(config, args.tokens, args.repeats, device)
    print(
        f"\none MoE layer, {args.tokens:,} tokens, top {config.num_experts_per_tok}, "
        "forward + backward"
    )
    first = times[EXPERT_COUNTS[0]]
    for experts, seconds in times.items():
        milliseconds = seconds * 1e3
        print(f"{experts:5} experts {milliseconds:9.1f} ms   {seconds / first:5.2f}x")


if __name__ == "__main__":
    main()
