"""The hyper-parameters of DeepSeek-V3 under the names of its published config.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from helpers.checks import (
    NonNegative,
    Positive,
    Range,
    Whole,
    check,
    check_fields,
    need,
)
from helpers.v3.published import read_published

# Far beyond any published model: above it a file is damaged, or not a config at all.
Size = Annotated[int, Range(1, 10_000_000)]
Layers = Annotated[int, Range(1, 10_000)]
Experts = Annotated[int, Range(1, 100_000)]

YARN_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)


@dataclass
class V3Config:
    """One model. The defaults are those of the 671B model (V3 section 4.2).

    `scoring_func="softmax"` with no shared expert, one group and
    `routed_scaling_factor=1` is a Mixtral-style layer. With `first_k_dense_replace` of
    at least `num_hidden_layers` all layers are dense. Raises ValueError that names the
    field for values that cannot work.
    """

    vocab_size: Size = 129280
    hidden_size: Size = 7168
    intermediate_size: Size = 18432  # of a dense feed-forward
    moe_intermediate_size: Size = 2048  # of one expert
    num_hidden_layers: Layers = 61
    num_attention_heads: Size = 128
    n_shared_experts: Annotated[int, Range(0, 1000)] = 1
    n_routed_experts: Experts = 256
    routed_scaling_factor: Positive = 2.5
    kv_lora_rank: Size = 512
    q_lora_rank: Size | None = 1536  # None: queries without a latent
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    qk_nope_head_dim: Size = 128
    n_group: Experts = 8  # groups of experts, one a node
    topk_group: Experts = 4  # groups that a token may go to
    num_experts_per_tok: Experts = 8
    first_k_dense_replace: Whole = 3  # so many dense layers come first
    norm_topk_prob: bool = True
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    seq_aux: bool = True  # balance within each sequence; False: within the batch
    num_nextn_predict_layers: Annotated[int, Range(0, 1000)] = 1  # MTP depths
    max_position_embeddings: Size = 163840
    initializer_range: Positive = 0.006
    rms_norm_eps: Positive = 1e-6
    rope_theta: Annotated[float, Range(1, above=True)] = 10000.0
    rope_scaling: dict[str, Any] | None = None  # YaRN, or None for plain RoPE

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_experts()
        rope = self.qk_rope_head_dim
        need(
            rope % 2 == 0, "qk_rope_head_dim", rope, "RoPE turns pairs: an even number"
        )
        if self.rope_scaling is not None:
            check_yarn(self.rope_scaling)

    def _check_experts(self) -> None:
        """The router's numbers must fit together (V3 section 2.1.2)."""
        groups = self.n_group
        experts = self.n_routed_experts
        need(
            experts % groups == 0,
            "n_group",
            groups,
            f"it must divide n_routed_experts={experts}",
        )
        per_group = experts // groups
        need(
            groups == 1 or per_group >= 2,
            "n_group",
            groups,
            "a group's score is the sum of its top 2, so it must hold 2 experts",
        )
        need(
            self.topk_group <= groups,
            "topk_group",
            self.topk_group,
            f"it must be at most n_group={groups}",
        )
        left = self.topk_group * per_group
        need(
            self.num_experts_per_tok <= left,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"topk_group leaves only {left} experts to choose from",
        )

    @classmethod
    def deepseek_v3(cls) -> "V3Config":
        """The 671B model with YaRN 40 times 4,096 positions (V3 sections 4.2, 4.3)."""
        yarn = {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
        return cls(rope_scaling=yarn)

    @classmethod
    def tiny(cls, **changes: Any) -> "V3Config":
        """A V3 for two cores with every mechanism in it.

        The initial std keeps V3's ratio to its width: 0.006 * sqrt(7168 / 128).
        """
        sizes: dict[str, Any] = {
            "vocab_size": 2048,
            "hidden_size": 128,
            "intermediate_size": 384,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 64,
            "kv_lora_rank": 48,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "max_position_embeddings": 1024,
            "initializer_range": 0.045,
            "routed_scaling_factor": 1.0,
        }
        return cls(**(sizes | changes))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "V3Config":
        """Read a config.json; `helpers.v3.published` says which are understood.

        Raises ValueError that names a field which asks for what is not computed here.
        """
        known = frozenset(field.name for field in fields(cls))
        return cls(**read_published(config, known))

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `from_hf` and transformers read.

        transformers passes `scoring_func` over and computes sigmoid gates, so a softmax
        model gets a `model_type` that it does not know: better refused than misread.
        """
        sigmoid = self.scoring_func == "sigmoid"
        more = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3" if sigmoid else "deepseek_v3_softmax",
            "torch_dtype": "float32",
            "hidden_act": "silu",
            "num_key_value_heads": self.num_attention_heads,
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return more | asdict(self)

    def with_(self, **changes: Any) -> "V3Config":
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def check_yarn(yarn: dict[str, Any]) -> None:
    """Raise ValueError for a `rope_scaling` that is not YaRN as V3 computes it."""

    def check_part(ok: bool, remedy: str) -> None:
        need(ok, "rope_scaling", yarn, remedy)

    kind = yarn.get("rope_type", yarn.get("type"))
    check_part(kind == "yarn", "only type 'yarn' is computed (null for plain RoPE)")
    check_part(yarn.get("truncate", True) is True, "truncate=false is not computed")
    for name in yarn:
        known = name in YARN_NUMBERS or name in ("type", "rope_type", "truncate")
        check_part(known, f"{name} is not known here and may change what is computed")
    for name in YARN_NUMBERS:
        check(f"rope_scaling: {name}", yarn.get(name), NonNegative | None)
    original = yarn.get("original_max_position_embeddings")
    check_part(bool(original), "original_max_position_embeddings is missing")
    check_part((yarn.get("factor") or 1) >= 1, "factor must be at least 1")
    # transformers, too, reads 0 as not given
    fast = yarn.get("beta_fast") or 32
    slow = yarn.get("beta_slow") or 1
    check_part(fast >= slow, "beta_fast must be at least beta_slow")
