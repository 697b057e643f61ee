"""Configs of DeepSeek's own inference code, such as its `config_671B.json`.

That code (github.com/deepseek-ai/DeepSeek-V3, inference/model.py) has other names than
the config.json on Hugging Face, other values where a file is silent, and rules that it
does not write down. Here they are translated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from helpers.checks import Count, Positive, Range, Whole, check_fields, need

# These tell a native file from one of Hugging Face.
NATIVE_ONLY = ("dim", "n_layers", "n_heads")
# About the arithmetic and the buffers of that code, not about the model.
PASSED_OVER = frozenset({"dtype", "scale_fmt", "max_batch_size"})
# Its routers have a bias in models of this width, and in no other.
WIDTH_WITH_BIAS = 7168


@dataclass(frozen=True)
class NativeConfig:
    """The fields of that code's `ModelArgs`, with its defaults (the 16B model's)."""

    vocab_size: Count = 102400
    dim: Count = 2048
    inter_dim: Count = 10944
    moe_inter_dim: Count = 1408
    n_layers: Count = 27
    n_dense_layers: Whole = 1
    n_heads: Count = 16
    n_routed_experts: Count = 64
    n_shared_experts: Whole = 2
    n_activated_experts: Count = 6
    n_expert_groups: Count = 1
    n_limited_groups: Count = 1
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    route_scale: Positive = 1.0
    q_lora_rank: Whole = 0  # 0: queries without a latent
    kv_lora_rank: Count = 512
    qk_nope_head_dim: Count = 128
    qk_rope_head_dim: Count = 64
    v_head_dim: Count = 128
    # YaRN, in use where max_seq_len is above original_seq_len
    max_seq_len: Count = 16384
    original_seq_len: Count = 4096
    rope_theta: Positive = 10000.0
    rope_factor: Annotated[float, Range(1)] = 40
    beta_fast: Positive = 32
    beta_slow: Positive = 1
    mscale: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        has_bias = self.dim == WIDTH_WITH_BIAS
        need(
            has_bias or self.n_limited_groups >= self.n_expert_groups,
            "n_limited_groups",
            self.n_limited_groups,
            f"with dim={self.dim} the router has no bias, and a group is scored by its "
            "best expert (DeepSeek-V2); only by its best two is computed here",
        )


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a config has the names of DeepSeek's inference code."""
    return any(name in config for name in NATIVE_ONLY)


def read_native(config: Mapping[str, Any]) -> dict[str, Any]:
    """The V3Config fields that a native config stands for.

    Raises ValueError that names a field which that code does not have, or which asks
    for what is not computed here.
    """
    known = {field.name for field in fields(NativeConfig)}
    for name, value in config.items():
        need(
            name in known or name in PASSED_OVER,
            name,
            value,
            "DeepSeek's inference code has no such field: take it out, or give the "
            "config.json of Hugging Face",
        )
    given = {name: value for name, value in config.items() if name in known}
    return _translated(NativeConfig(**given))


def _translated(native: NativeConfig) -> dict[str, Any]:
    return {
        "vocab_size": native.vocab_size,
        "hidden_size": native.dim,
        "intermediate_size": native.inter_dim,
        "moe_intermediate_size": native.moe_inter_dim,
        "num_hidden_layers": native.n_layers,
        "first_k_dense_replace": native.n_dense_layers,
        "num_attention_heads": native.n_heads,
        "n_routed_experts": native.n_routed_experts,
        "n_shared_experts": native.n_shared_experts,
        "num_experts_per_tok": native.n_activated_experts,
        "n_group": native.n_expert_groups,
        "topk_group": native.n_limited_groups,
        "scoring_func": native.score_func,
        # that code normalises sigmoid gates only
        "norm_topk_prob": native.score_func == "sigmoid",
        "routed_scaling_factor": native.route_scale,
        "q_lora_rank": native.q_lora_rank or None,
        "kv_lora_rank": native.kv_lora_rank,
        "qk_nope_head_dim": native.qk_nope_head_dim,
        "qk_rope_head_dim": native.qk_rope_head_dim,
        "v_head_dim": native.v_head_dim,
        "rope_theta": native.rope_theta,
        # that code leaves the MTP module of the files out
        "num_nextn_predict_layers": 0,
        **_context(native),
    }


def _context(native: NativeConfig) -> dict[str, Any]:
    """YaRN and the longest text."""
    if native.max_seq_len <= native.original_seq_len:
        return {"max_position_embeddings": native.max_seq_len, "rope_scaling": None}
    # max_seq_len is what its cache holds; the model reaches as far as YaRN stretches
    reach = int(native.rope_factor * native.original_seq_len)
    yarn = {
        "type": "yarn",
        "factor": native.rope_factor,
        "original_max_position_embeddings": native.original_seq_len,
        "beta_fast": native.beta_fast,
        "beta_slow": native.beta_slow,
        # it scales the logits by mscale, and cos and sin by nothing
        "mscale": native.mscale,
        "mscale_all_dim": native.mscale,
    }
    return {
        "max_position_embeddings": max(native.max_seq_len, reach),
        "rope_scaling": yarn,
    }
