"""What a training run costs: weights and FLOPs from a config, rates beside peaks.

Training is 6 FLOP per weight and token: a multiply and an add, once forward and twice
backward. Lookups, norms, softmax, optimizer and recomputation are not counted. Rates
are TFLOP/s of one GPU. All functions raise ValueError for input that cannot work
(negative, NaN, infinite).
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from helpers.checks import NonNegative, Range, Share, check, need
from helpers.evidence.facts import FACTS, fact
from helpers.v3.config import V3Config

import numpy as np

ASSUMED = "ASSUMED: ours, not published"
FLOP_PER_WEIGHT = 6.0
DENSE_OR_MIXTRAL = ("llama", "mixtral", "qwen2")
COUNTED = ("deepseek_v3", *DENSE_OR_MIXTRAL)

Length = Annotated[float, Range(1, 1e9)]
Amount = Annotated[float, Range(1e-9, 1e200)]  # so that a quotient of two is finite


class Weights(NamedTuple):
    """Numbers of weights: all that are stored, and those that one token uses."""

    stored: int
    used: int

    def times(self, layers: int) -> "Weights":
        """The same in so many layers."""
        return Weights(layers * self.stored, layers * self.used)


@dataclass(frozen=True)
class Sizes:
    """What is counted of a model, under one name whichever config it comes from."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    key_and_value: int  # sizes of a head's key and value together
    attention: int  # weights of one layer's projections
    dense_layers: int  # layers whose feed-forward has no experts
    intermediate_size: int  # of a dense feed-forward
    expert_size: int  # the same of one expert
    routed_experts: int
    chosen_experts: int  # of the routed ones, by each token
    shared_experts: int
    tied: bool = False  # the output head is the embedding's table
    mtp_depths: int | None = None  # None: a kind of model without MTP


def sizes(config: Any) -> Sizes:
    """The sizes in a V3Config or in a transformers config of one of the types COUNTED.

    Raises ValueError that names the model_type of anything else.
    """
    if isinstance(config, V3Config):
        return _sizes_of_v3(config)
    kind = getattr(config, "model_type", None)
    if isinstance(config, dict):
        kind = config.get("model_type")
    need(
        kind in COUNTED and not isinstance(config, dict),
        "model_type",
        kind,
        "give a V3Config, or a config object of transformers (no dict) of type "
        f"{', '.join(COUNTED)}",
    )
    if kind == "deepseek_v3":
        return _sizes_of_v3(V3Config.from_hf(config.to_dict()))
    return _sizes_of_llama(config)


def _sizes_of_v3(config: V3Config) -> Sizes:
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    return Sizes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_and_value=query + config.v_head_dim,
        attention=mla_weights(config),
        dense_layers=min(config.first_k_dense_replace, config.num_hidden_layers),
        intermediate_size=config.intermediate_size,
        expert_size=config.moe_intermediate_size,
        routed_experts=config.n_routed_experts,
        chosen_experts=config.num_experts_per_tok,
        shared_experts=config.n_shared_experts,
        mtp_depths=config.num_nextn_predict_layers,
    )


def _sizes_of_llama(config: Any) -> Sizes:
    """Of a transformers config: dense (llama, qwen2), or all layers MoE (mixtral)."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_local_experts", 0)
    return Sizes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        key_and_value=2 * head_dim,
        attention=gqa_weights(
            config.hidden_size, heads, config.num_key_value_heads, head_dim
        ),
        dense_layers=0 if experts else config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        expert_size=config.intermediate_size,
        routed_experts=experts,
        chosen_experts=getattr(config, "num_experts_per_tok", 0),
        shared_experts=0,
        tied=bool(config.tie_word_embeddings),
    )


def mla_weights(config: V3Config) -> int:
    """Weights of one layer's latent attention (V3 section 2.1.1, eq. 1 to 11)."""
    H = config.hidden_size
    h = config.num_attention_heads
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    # Queries, through a latent of their own where there is one
    if config.q_lora_rank is None:
        queries = H * h * query
    else:
        queries = config.q_lora_rank * (H + h * query)
    # Down to what is cached: the latent and the one key that carries the position
    down = H * (config.kv_lora_rank + config.qk_rope_head_dim)
    # Up again, to each head's key and value
    up = config.kv_lora_rank * h * (config.qk_nope_head_dim + config.v_head_dim)
    output = h * config.v_head_dim * H
    return queries + down + up + output


def gqa_weights(hidden_size: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Weights of one layer of grouped-query attention: q and o, k and v."""
    queries_and_output = 2 * hidden_size * heads * head_dim
    keys_and_values = 2 * hidden_size * kv_heads * head_dim
    return queries_and_output + keys_and_values


def ffn_weights(hidden_size: int, intermediate_size: int) -> int:
    """Weights of one gated feed-forward: gate, up and down."""
    return 3 * hidden_size * intermediate_size


def moe_block(model: Sizes) -> dict[str, Weights]:
    """The parts of one mixture-of-experts layer; all 0 for a model without experts."""
    expert = ffn_weights(model.hidden_size, model.expert_size)
    shared = model.shared_experts * expert
    router = model.routed_experts * model.hidden_size
    routed = Weights(model.routed_experts * expert, model.chosen_experts * expert)
    return {
        "shared experts": Weights(shared, shared),
        "router": Weights(router, router),
        "routed experts": routed,
    }


def mtp_weights(model: Sizes) -> Weights:
    """One MTP module (V3 section 2.2): a block, a projection, and the head it uses.

    Embedding and head are the main model's: a token's second prediction goes through
    the head again, but nothing more is stored.
    """
    H = model.hidden_size
    stored = model.attention + 2 * H * H
    used = stored
    for part in moe_block(model).values():
        stored += part.stored
        used += part.used
    return Weights(stored, used + model.vocab_size * H)


def table_weights(model: Sizes) -> tuple[Weights, Weights]:
    """Embedding and output head.

    A tied table is one table: stored as the embedding, used as the head, and counted
    once in each sum.
    """
    table = model.vocab_size * model.hidden_size
    if model.tied:
        return Weights(table, 0), Weights(0, table)
    return Weights(table, table), Weights(table, table)


def weights(config: Any, mtp: bool = False) -> dict[str, Weights]:
    """{component: Weights(stored, used by one token)}, weights in the matrices.

    Norms and biases are too few to show. config: as `sizes` takes it. `mtp` adds V3's
    MTP modules, with the output head that they use but do not store.
    """
    model = sizes(config)
    embedding, head = table_weights(model)
    attention = Weights(model.attention, model.attention)
    ffn = ffn_weights(model.hidden_size, model.intermediate_size)
    parts = {
        "embedding": embedding,
        "attention projections": attention.times(model.layers),
        "dense FFN": Weights(ffn, ffn).times(model.dense_layers),
        "head": head,
    }
    for name, part in moe_block(model).items():
        parts[name] = part.times(model.layers - model.dense_layers)
    if mtp and model.mtp_depths is not None:
        parts["MTP"] = mtp_weights(model).times(model.mtp_depths)
    return parts


def flops_per_token(
    config: Any, length: float, seen: float = 0.5, mtp: bool = False
) -> dict[str, float]:
    """{component: training FLOP per token}, forward and backward, at `length` tokens.

    config and `mtp`: as in `weights`. A token attends to itself and to the share `seen`
    of the length - 1 others: 0.5 is causal attention, 1 counts the whole square, and
    0.25 gives ISCA Table 2's figure for Llama. The embedding is a lookup and left out.
    """
    _check_number("length", length, Length)
    _check_number("seen", seen, Share)
    model = sizes(config)
    flops = {}
    for name, part in weights(config, mtp).items():
        if name != "embedding":
            flops[name] = FLOP_PER_WEIGHT * part.used
    # Each token seen: a query with its key, and its value into the sum
    tokens_seen = 1 + seen * (length - 1)
    one_layer = FLOP_PER_WEIGHT * model.heads * model.key_and_value * tokens_seen
    if mtp and model.mtp_depths is not None:
        flops["MTP"] += one_layer * model.mtp_depths
    flops["attention over tokens"] = one_layer * model.layers
    return flops


def peak(gpu: str, precision: str) -> float:
    """Dense peak in TFLOP/s of "a100", "h100", "h800" or "h20" in "bf16" or "fp8".

    Raises ValueError for a GPU that is not known and for what a GPU has not got.
    """
    gpus = sorted(key.partition(".")[0] for key in FACTS if key.endswith(".bf16"))
    need(gpu in gpus, "gpu", gpu, f"use one of {', '.join(gpus)}")
    has = [name for name in ("bf16", "fp8") if f"{gpu}.{name}" in FACTS]
    need(precision in has, "precision", precision, f"{gpu} has {' and '.join(has)}")
    return fact(f"{gpu}.{precision}").value


def mfu(tflops: float, gpu: str, precision: str) -> float:
    """Share of the named dense peak that a rate is; above 1 is a ValueError."""
    top = peak(gpu, precision)
    _check_number("tflops", tflops, NonNegative)
    need(
        tflops <= top,
        "tflops",
        tflops,
        f"MFU is at most 1, and {gpu} has {top:g} TFLOP/s in {precision}",
    )
    return tflops / top


def rate(flop: float, hours: float) -> float:
    """TFLOP/s per GPU of a run that did `flop` operations in `hours` GPU hours."""
    _check_number("flop", flop, Amount)
    _check_number("hours", hours, Amount)
    return flop / (hours * 3600) / 1e12


def _check_number(field: str, value: Any, kind: Any) -> None:
    """`check` for what notebooks compute: numpy's single numbers count as numbers."""
    plain = value.item() if isinstance(value, np.generic) else value
    check(field, plain, kind)
