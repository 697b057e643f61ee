"""What a training run costs: FLOPs per token from a config, and rates beside the peaks of GPUs.

Training is 6 FLOP per weight and token: a multiply and an add, once forward and twice backward. Lookups, norms, softmax, optimizer and
recomputation are not counted. Rates are TFLOP/s of one GPU. All raise ValueError for input that cannot be (negative, NaN, infinite)."""
from numbers import Real
from typing import Any

from helpers.facts import FACTS, fact
from helpers.model import V3Config

ASSUMED = "ASSUMED: ours, not published"


def _check(low: float, high: float, remedy: str = "", **fields: Any) -> None:
    """ValueError unless each field is a finite number from low to high."""
    for name, value in fields.items():
        if not (isinstance(value, Real) and low <= value <= high):  # NaN is not
            raise ValueError(f"{name}={value!r} cannot be: {remedy or f'use a finite number from {low:g} to {high:g}'}")


def weights(config: Any, mtp: bool = False) -> dict[str, tuple[int, int]]:
    """{component: (stored, used by one token)}, numbers of weights in the matrices; norms and biases are too few to show.
    config: a V3Config or a transformers config of type deepseek_v3, llama, mixtral or qwen2 (others: ValueError). `mtp` adds V3's
    MTP modules, with the output head that they use but do not store (V3 section 2.2)."""
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
    gives ISCA Table 2's figure for Llama. The embedding is a lookup and left out."""
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


def rate(flop: float, hours: float) -> float:
    """TFLOP/s per GPU of a run that did `flop` operations in `hours` GPU hours."""
    _check(1e-9, 1e200, flop=flop, hours=hours)
    return flop / (hours * 3600) / 1e12
