"""What a training run costs: FLOPs per token from a config, GPU hours, dollars, ledgers, and ranges where a number is not known.

Training is 6 FLOP per weight and token: a multiply and an add, once forward and twice backward. Lookups, norms, softmax, optimizer and
recomputation are not counted. Rates are TFLOP/s of one GPU. All raise ValueError for input that cannot be (negative, NaN, infinite).
"""
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.facts import FACTS, fact
from helpers.model import V3Config

ASSUMED = "ASSUMED: ours, not published"


def _check(low: float, high: float, remedy: str = "", **fields: Any) -> None:
    """ValueError unless each field (a number or an array of them) is finite and from low to high."""
    for name, value in fields.items():
        try:
            numbers = np.asarray(value if isinstance(value, (int, float, np.number, np.ndarray)) else np.nan, dtype=float)
        except (TypeError, ValueError, OverflowError):
            numbers = np.nan
        if not np.all((numbers >= low) & (numbers <= high)):  # also not where a number is NaN
            raise ValueError(f"{name}={value!r} cannot be: {remedy or f'use a finite number from {low:g} to {high:g}'}")


def weights(config: Any, mtp: bool = False) -> dict[str, tuple[int, int]]:
    """{component: (stored, used by one token)}, numbers of weights in the matrices; norms and biases are too few to show.

    config: a V3Config or a transformers config of type deepseek_v3, llama, mixtral or qwen2 (others: ValueError). `mtp` adds V3's
    MTP modules, with the output head that they use but do not store (V3 section 2.2).
    """
    c = V3Config.from_hf(config.to_dict()) if getattr(config, "model_type", "") == "deepseek_v3" else config
    H, h, layers, table = c.hidden_size, c.num_attention_heads, c.num_hidden_layers, c.vocab_size * c.hidden_size
    if isinstance(c, V3Config):
        qk = c.qk_nope_head_dim + c.qk_rope_head_dim
        attention = H * h * qk if c.q_lora_rank is None else c.q_lora_rank * (H + h * qk)
        attention += H * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * h * (c.qk_nope_head_dim + c.v_head_dim) + h * c.v_head_dim * H
        dense, width, experts, shared = c.first_k_dense_replace, c.moe_intermediate_size, c.n_routed_experts, c.n_shared_experts
    elif c.model_type in ("llama", "mixtral", "qwen2"):
        attention = 2 * H * (getattr(c, "head_dim", None) or H // h) * (h + c.num_key_value_heads)
        experts, width, shared = getattr(c, "num_local_experts", 0), c.intermediate_size, 0
        dense = 0 if experts else layers
    else:
        raise ValueError(f"model_type={c.model_type!r} is not counted here: use a V3Config, deepseek_v3, llama, mixtral or qwen2")
    block = {"shared experts": (3 * H * width * shared,) * 2, "router": (experts * H,) * 2,
             "routed experts": (3 * H * width * experts, 3 * H * width * getattr(c, "num_experts_per_tok", 0))}
    parts = {"embedding": (table, table), "attention projections": (layers * attention,) * 2,
             "dense FFN": (dense * 3 * H * c.intermediate_size,) * 2, "head": (table, table)}
    parts |= {name: ((layers - dense) * stored, (layers - dense) * used) for name, (stored, used) in block.items()}
    if mtp and isinstance(c, V3Config):
        stored, used = (sum(part) + attention + 2 * H * H for part in zip(*block.values(), strict=True))
        parts["MTP"] = (c.num_nextn_predict_layers * stored, c.num_nextn_predict_layers * (used + table))
    return parts


def flops_per_token(config: Any, length: int, seen: float = 0.5, mtp: bool = False) -> dict[str, float]:
    """{component: training FLOP per token}, forward and backward, at `length` tokens; config and `mtp` as in `weights`.

    A token attends to itself and to the share `seen` of the length - 1 others: 0.5 is causal attention, 1 counts the whole square, and 0.25
    gives ISCA Table 2's figure for Llama. The embedding is a lookup and left out.
    """
    _check(1, 1e9, length=length)
    _check(0, 1, seen=seen)
    parts = {name: 6.0 * used for name, (_, used) in weights(config, mtp).items() if name != "embedding"}
    if hasattr(config, "kv_lora_rank"):  # a query with a key, and the sum of values
        both = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        both = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    one_layer = 6.0 * config.num_attention_heads * both * (1 + seen * (length - 1))
    if "MTP" in parts:
        parts["MTP"] += one_layer * config.num_nextn_predict_layers
    return parts | {"attention over tokens": one_layer * config.num_hidden_layers}


def peak(gpu: str, precision: str) -> float:
    """Dense peak in TFLOP/s of "a100", "h100", "h800" or "h20" in "bf16" or "fp8"; ValueError for what a GPU has not got."""
    gpus = sorted(key.partition(".")[0] for key in FACTS if key.endswith(".bf16"))
    if gpu not in gpus:
        raise ValueError(f"gpu={gpu!r} is not known: use one of {', '.join(gpus)}")
    known = [name for name in ("bf16", "fp8") if f"{gpu}.{name}" in FACTS]
    if precision not in known:
        raise ValueError(f"precision={precision!r} is not on {gpu}: use {' or '.join(known)}")
    return fact(f"{gpu}.{precision}").value


def mfu(tflops: float, gpu: str, precision: str) -> float:
    """Share of the named dense peak that a rate is; above 1 is a ValueError."""
    _check(0, peak(gpu, precision), f"MFU is at most 1, and {gpu} has {peak(gpu, precision):g} TFLOP/s in {precision}", tflops=tflops)
    return tflops / peak(gpu, precision)


def gpu_hours(flop: float, tflops: float) -> float:
    """GPU hours that `flop` operations take at `tflops` TFLOP/s per GPU."""
    _check(1e-9, 1e200, flop=flop, tflops=tflops)
    return flop / (tflops * 1e12) / 3600


def rate(flop: float, hours: float) -> float:
    """TFLOP/s per GPU of a run that did `flop` operations in `hours` GPU hours: the inverse of `gpu_hours`."""
    _check(1e-9, 1e200, flop=flop, hours=hours)
    return flop / (hours * 3600) / 1e12


def days(hours: float, gpus: float) -> float:
    """Days on the clock that `hours` GPU hours take on `gpus` GPUs."""
    _check(0, 1e200, hours=hours)
    _check(1, 1e12, gpus=gpus)
    return hours / gpus / 24


def dollars(hours: float, price: float) -> float:
    """USD for `hours` GPU hours at `price` USD each."""
    _check(0, 1e150, hours=hours, price=price)
    return hours * price


@dataclass(frozen=True)
class Row:
    """One line of a ledger, in GPU hours; status is one of `facts.STATUSES` or ASSUMED."""

    name: str
    hours: float
    source: str
    status: str

    def __post_init__(self) -> None:
        _check(0, 1e150, hours=self.hours)


V3_RUN, R1_RUN = ([Row(name, fact(key).value, fact(key).source, fact(key).status) for name, key in run.items()] for run in (
    {"pre-training": "v3.gpu_hours_pretrain", "context extension": "v3.gpu_hours_context", "post-training": "v3.gpu_hours_post"},
    {"R1-Zero": "r1.gpu_hours_zero", "R1 SFT data": "r1.gpu_hours_sft_data", "R1": "r1.gpu_hours_r1"}))
V3_ATTENTION = flops_per_token(V3Config.deepseek_v3(), fact("v3.train.seq_len").value)["attention over tokens"]  # FLOP per token


@dataclass(frozen=True)
class Range:
    """A value that is not known: from low to high, most likely `mode`; `why` says what it leans on."""

    low: float
    mode: float
    high: float
    unit: str
    why: str

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.mode <= self.high < float("inf"):
            raise ValueError(f"low={self.low}, mode={self.mode}, high={self.high} cannot be: put finite numbers from 0 on in this order")

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} {self.unit}, most likely {self.mode:g} ({ASSUMED}; {self.why})"


RANGES = {
    "price": Range(1, fact("v3.usd_per_gpu_hour").value, 4, "USD per H800 hour", "the report prints 2, itself an assumed rent"),
    "mfu": Range(0.25, fact("v3.mfu").value, 0.45, "of the H800's BF16 peak", "V3's published one, causal, in the middle"),
    "full_runs": Range(1, 1, 3, "full pre-training runs", "the report tells of one, without a rollback"),
    "experiments": Range(0.2, 1, 4, "full runs' worth of trials", "the low end is near what the report's own ablations took"),
}


def project(price: Any, mfu: Any, full_runs: Any = 1, experiments: Any = 0, r1: bool = False,
            tokens: Any = fact("v3.tokens").value, active: Any = fact("v3.recomputed_active_head_only").value) -> dict[str, Any]:  # noqa: B008
    """{"hours", "usd"} of making a V3-like model on H800s; numbers, or arrays of one shape.

    Pre-training is (6 x active + V3's causal attention at length 4096) FLOP per token at `mfu` of the BF16 peak, done `full_runs` times, and
    `experiments` times more in trials. V3's hours of context extension and post-training are added, and R1's if `r1`. `active` are the weights
    that one token uses, without the embedding.
    """
    _check(1e-6, 1, "it is a share of the peak, use more than 0 and at most 1", mfu=mfu)
    _check(0, 1e20, price=price, full_runs=full_runs, experiments=experiments, tokens=tokens, active=active)
    once = gpu_hours((6.0 * active + V3_ATTENTION) * tokens, mfu * peak("h800", "bf16"))
    hours = once * (full_runs + experiments) + sum(row.hours for row in V3_RUN[1:] + R1_RUN * bool(r1))
    return {"hours": hours, "usd": dollars(hours, price)}


def sample(n: int, seed: int, ranges: dict[str, Range] = RANGES, r1: bool = True) -> dict[str, np.ndarray]:
    """`n` draws of `project`, each range a triangle over low, mode, high, independent of the others. Same seed, same draws."""
    _check(1, 1e7, n=n)
    draw = np.random.default_rng(seed).triangular
    return project(**{name: draw(r.low, r.mode, r.high, n) if r.low < r.high else r.mode for name, r in ranges.items()}, r1=r1)


def tornado(ranges: dict[str, Range] = RANGES, r1: bool = True) -> dict[str, tuple[float, float]]:
    """{name: (USD at its low, USD at its high)}, all other ranges at their mode, and "r1" left out and put in; widest first."""
    modes = {name: r.mode for name, r in ranges.items()}
    bars = {name: tuple(project(**modes | {name: v}, r1=r1)["usd"] for v in (r.low, r.high)) for name, r in ranges.items()}
    bars["r1"] = tuple(project(**modes, r1=included)["usd"] for included in (False, True))
    return dict(sorted(bars.items(), key=lambda bar: -abs(bar[1][1] - bar[1][0])))
