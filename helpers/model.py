"""DeepSeek-V3, complete, in plain PyTorch that reads like the equations of the technical report (arXiv:2412.19437, section 2).

Shapes: B sequences, T tokens, N = B*T, H hidden_size, h heads, c = kv_lora_rank, dn / dr / dv = qk_nope / qk_rope / v head dims,
E routed experts, K of them per token, f = moe_intermediate_size, V vocabulary, D MTP depth."""
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Fields of a config.json that would change what is computed, with the only values that this model computes.
_ONLY = {
    "model_type": ("deepseek_v3", "deepseek_v3_softmax"), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "attention_dropout": (0, None), "moe_layer_freq": (1,), "topk_method": ("noaux_tc",), "tie_word_embeddings": (False,), "rope_interleave": (True,),
    "sliding_window": (None,), "mtp_hidden_states_first": (False,),
}


@dataclass
class V3Config:
    """DeepSeek-V3's hyper-parameters under the names of its Hugging Face config.json. Defaults are the 671B model's (V3 section 4.2).
    `scoring_func="softmax"` with no shared expert, one group and `routed_scaling_factor=1` is a Mixtral-style layer;
    `first_k_dense_replace=num_hidden_layers` is a dense transformer. Raises ValueError naming the field that cannot work."""
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    routed_scaling_factor: float = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    n_group: int = 8
    topk_group: int = 4
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    seq_aux: bool = True
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 163840
    initializer_range: float = 0.006
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, right: str) -> None:
            if not ok:
                raise ValueError(f"{field}={getattr(self, field)!r} cannot work: {right}")

        for f in fields(self):
            value, low = getattr(self, f.name), int(f.name not in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"))
            if f.type is int or (f.name == "q_lora_rank" and value is not None):
                need(type(value) is int and value >= low, f.name, f"it must be an integer of at least {low}")
            elif f.type is float:
                need(type(value) in (int, float) and 0 < value <= 1e308, f.name, "it must be a finite number above 0")
            elif f.type is bool:
                need(type(value) is bool, f.name, "it must be true or false")
        per_group = self.n_routed_experts // self.n_group
        left, yarn = self.topk_group * per_group, self.rope_scaling
        need(self.rope_theta > 1, "rope_theta", "it must be above 1, so that the pairs turn at different speeds")
        need(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "RoPE rotates pairs, so it must be even")
        need(self.first_k_dense_replace <= self.num_hidden_layers, "first_k_dense_replace", f"num_hidden_layers is {self.num_hidden_layers}")
        need(self.n_routed_experts % self.n_group == 0, "n_group", f"it must divide n_routed_experts={self.n_routed_experts}")
        need(self.n_group == 1 or per_group >= 2, "n_group", "a group's score is the sum of its top 2, so it must hold at least 2 experts")
        need(self.topk_group <= self.n_group, "topk_group", f"it must be at most n_group={self.n_group}")
        need(self.num_experts_per_tok <= left, "num_experts_per_tok", f"topk_group leaves only {left} experts to choose from")
        need(self.scoring_func in ("sigmoid", "softmax"), "scoring_func", "it must be 'sigmoid' (V3) or 'softmax' (Mixtral)")
        if yarn is None:
            return
        need(isinstance(yarn, Mapping), "rope_scaling", "it must be null or an object with type 'yarn'")
        need(yarn.get("rope_type", yarn.get("type")) == "yarn", "rope_scaling", "only type 'yarn' is computed (null for plain RoPE)")
        need(yarn.get("truncate", True) is True, "rope_scaling", "truncate=false is not computed")
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
            number = type(yarn.get(name)) in (int, float) and 0 <= yarn[name] <= 1e308
            need(number or yarn.get(name) is None, "rope_scaling", f"{name} must be a number of at least 0")
        need(bool(yarn.get("original_max_position_embeddings")), "rope_scaling", "original_max_position_embeddings is missing")
        need((yarn.get("factor") or 1) >= 1, "rope_scaling", "factor must be at least 1")
        need((yarn.get("beta_fast") or 32) >= (yarn.get("beta_slow") or 1), "rope_scaling", "beta_fast must be at least beta_slow")

    @classmethod
    def deepseek_v3(cls) -> "V3Config":
        """The 671B model, YaRN factor 40 over 4,096 positions (V3 sections 4.2 and 4.3, inference/configs/config_671B.json)."""
        return cls(rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
                                 "mscale": 1.0, "mscale_all_dim": 1.0})

    @classmethod
    def tiny(cls, **changes: Any) -> "V3Config":
        """A V3 for two cores, every mechanism in it. The initial std keeps V3's ratio to its width: 0.006 * sqrt(7168 / hidden_size)."""
        return cls(**dict(
            vocab_size=2048, hidden_size=128, intermediate_size=384, moe_intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1,
            q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, max_position_embeddings=1024,
            initializer_range=0.045, routed_scaling_factor=1.0) | changes)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "V3Config":
        """Read a config.json of DeepSeek-V3, published form or transformers 5's `rope_parameters`.
        Fields that change nothing in the computation are passed over; one that asks for what this model does not compute is a
        ValueError that names it. `num_mtp_layers` is transformers' second name for `num_nextn_predict_layers`."""
        if not isinstance(config, Mapping):
            raise ValueError(f"a config must be a JSON object, not {type(config).__name__}")
        others = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
        config = {others[name]: value for name, value in config.items() if name in others} | dict(config)
        heads = config.get("num_attention_heads", cls.num_attention_heads)
        for name, values in (_ONLY | {"num_key_value_heads": (heads, None)}).items():  # MLA has a key and a value for each head
            if name in config and config[name] not in values:
                raise ValueError(f"{name}={config[name]!r} is not computed here: it must be {values[0]!r}")
        rope = config.get("rope_parameters")
        if rope is not None:
            if not isinstance(rope, Mapping) or rope.get("partial_rotary_factor", 1.0) != 1.0:
                raise ValueError(f"rope_parameters={rope!r} is not computed here: it must be null, or an object with partial_rotary_factor 1 or none")
            config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", cls.rope_theta))
            config["rope_scaling"] = {"rope_type": rope.get("type", "default")} | {k: v for k, v in rope.items() if k != "rope_theta"}
        scaling = config.get("rope_scaling")
        if isinstance(scaling, Mapping):  # a copy: transformers writes into the dicts that it is given
            config["rope_scaling"] = None if scaling.get("rope_type", scaling.get("type")) == "default" else dict(scaling)
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `from_hf` and transformers read. transformers passes `scoring_func` over and computes sigmoid gates, so a
        softmax model gets a `model_type` that it does not know: better refused than read wrongly."""
        kind = "deepseek_v3" if self.scoring_func == "sigmoid" else "deepseek_v3_softmax"
        same = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": kind, "torch_dtype": "float32", "hidden_act": "silu",
                "num_key_value_heads": self.num_attention_heads, "topk_method": "noaux_tc", "moe_layer_freq": 1, "attention_bias": False,
                "attention_dropout": 0.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
        return same | asdict(self)

    def with_(self, **changes: Any) -> "V3Config":
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def rope_frequencies(config: V3Config) -> tuple[Tensor, float, float]:
    """(inverse frequencies [dr/2], factor on cos and sin, softmax scale) of the decoupled RoPE, with YaRN when the config has it.
    YaRN (arXiv:2309.00071) divides the frequency of slow dimensions by `factor`, keeps that of fast ones and ramps between; the
    attention logits are multiplied by (0.1 * mscale_all_dim * ln(factor) + 1)^2 (V3 section 4.3; 1.3689^2 in the 671B model)."""
    dim, theta, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    # on the CPU by name, so that a model built on the meta device still has its frequencies
    freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    softmax_scale = (config.qk_nope_head_dim + dim) ** -0.5
    if scaling is None:
        return freq, 1.0, softmax_scale
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or config.max_position_embeddings / original

    def dimension(turns: float) -> float:  # the dimension that makes this many turns over the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low = max(math.floor(dimension(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow") or 1)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)).clamp(0, 1)
    freq = freq * (1 - ramp) + freq / factor * ramp
    part, whole = scaling.get("mscale"), scaling.get("mscale_all_dim")
    turn_scale = scaling.get("attention_factor")
    if turn_scale is None:
        turn_scale = mscale(part) / mscale(whole) if part and whole else mscale(1.0)
    return freq, turn_scale, softmax_scale * (mscale(whole) ** 2 if whole else 1.0)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Interleaved RoPE: the pairs (x0, x1), (x2, x3), ... of x [..., dr] are complex numbers; turn [..., dr/2] multiplies them."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer; a `precision` (helpers.fp8.Recipe) rounds the operands of its product and of its gradients' (V3 section 3.3)."""

    precision: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.precision.linear(x, self.weight) if self.precision else super().forward(x)


class LatentCache:
    """What decoding remembers: per layer and token the kv latent and the rotated shared key, (c + dr) numbers, and nothing else.
    `rows` [layers, B, max_len, c + dr]; `length` tokens are filled. Allocated once. bytes per token = layers * (c + dr) * itemsize."""

    def __init__(self, config: V3Config, layers: int, batch: int, max_len: int, like: Tensor) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.rows = [torch.zeros(batch, max_len, width, dtype=like.dtype, device=like.device) for _ in range(layers)]
        self.length = 0

    def keep(self, alive: Tensor) -> None:
        """Keep the sequences `alive` (indices), drop the others."""
        self.rows = [r.index_select(0, alive) for r in self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes that the filled part takes."""
        return sum(r[:, : self.length].numel() * r.element_size() for r in self.rows)


class MLA(nn.Module):
    """Multi-head latent attention (V3 section 2.1.1, eq. 1-11): keys and values of all heads from one small latent per token."""

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.config, H, h = config, config.hidden_size, config.num_attention_heads
        dn, dr, dv, c, q = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank, config.q_lora_rank
        if q is None:
            self.q_proj = Linear(H, h * (dn + dr), bias=False)
        else:
            self.q_a_proj = Linear(H, q, bias=False)
            self.q_a_layernorm = nn.RMSNorm(q, eps=1e-6)  # the published code fixes 1e-6 for both latents
            self.q_b_proj = Linear(q, h * (dn + dr), bias=False)
        self.kv_a_proj_with_mqa = Linear(H, c + dr, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(c, eps=1e-6)
        self.kv_b_proj = Linear(c, h * (dn + dv), bias=False)
        self.o_proj = Linear(h * dv, H, bias=False)
        self.softmax_scale = rope_frequencies(config)[2]

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, H], rope [T, dr/2] -> q_nope [B, T, h, dn], rotated q_rope [B, T, h, dr], latent [B, T, c + dr] (all that is cached)."""
        cfg, h = self.config, self.config.num_attention_heads
        q = self.q_proj(x) if cfg.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (h, -1)).split((cfg.qk_nope_head_dim, cfg.qk_rope_head_dim), dim=-1)
        kv, k_rope = self.kv_a_proj_with_mqa(x).split((cfg.kv_lora_rank, cfg.qk_rope_head_dim), dim=-1)
        turned = rotate(torch.cat((q_rope, k_rope.unsqueeze(-2)), dim=-2), rope.unsqueeze(-2))  # the heads' queries and the one shared key
        q_rope, k_rope = turned.split((h, 1), dim=-2)
        return q_nope, q_rope, torch.cat((self.kv_a_layernorm(kv), k_rope.squeeze(-2)), dim=-1)

    def naive(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """Keys and values of every head written out, then ordinary causal attention: T * S of the latent's S rows. -> [B, T, h, dv]."""
        cfg, (B, S, _) = self.config, latent.shape
        kv, k_rope = latent.split((cfg.kv_lora_rank, cfg.qk_rope_head_dim), dim=-1)
        k_nope, v = self.kv_b_proj(kv).unflatten(-1, (cfg.num_attention_heads, -1)).split((cfg.qk_nope_head_dim, cfg.v_head_dim), dim=-1)
        k_rope = k_rope.unsqueeze(-2).expand(B, S, cfg.num_attention_heads, -1)
        q, k = torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope.to(k_nope.dtype)), dim=-1)
        v = F.pad(v, (0, max(q.shape[-1] - cfg.v_head_dim, 0)))  # equal widths keep the fast kernel: 1.5x on a CPU at these sizes
        q, k, v = q.to(v.dtype).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale)
        return out.transpose(1, 2)[..., : cfg.v_head_dim]

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same numbers without ever writing out keys or values: W_UK moves into the query, W_UV behind the softmax.
        q_nope . (W_UK l) = (W_UK^T q_nope) . l, so all heads attend to the same S latents (an MQA of width c + dr).
        mask [T, S] of booleans or None (every query sees all S). -> [B, T, h, dv]."""
        cfg, (B, T, h, _) = self.config, q_nope.shape
        c, up, precision = cfg.kv_lora_rank, self.kv_b_proj.weight, self.kv_b_proj.precision
        up = (precision.w(up) if precision else up).view(h, -1, c)
        w_uk, w_uv = up.split((cfg.qk_nope_head_dim, cfg.v_head_dim), dim=1)  # [h, dn, c], [h, dv, c]
        q = torch.matmul(q_nope.reshape(B * T, h, -1).transpose(0, 1), w_uk).transpose(0, 1).view(B, T, h, c)
        q = torch.cat((q, q_rope), dim=-1).view(B, T * h, -1)
        if T == 1:  # one query: written out, since the fused kernel is 3x slower here on a CPU at batch 64
            out = torch.bmm((torch.bmm(q, latent.transpose(1, 2)) * self.softmax_scale).softmax(dim=-1), latent[..., :c])
        else:
            mask = None if mask is None else mask.repeat_interleave(h, dim=0)
            q, keys = q.unsqueeze(1), latent.unsqueeze(1)
            out = F.scaled_dot_product_attention(q, keys, keys, attn_mask=mask, scale=self.softmax_scale)[..., :c]
        out = torch.matmul(out.reshape(B * T, h, c).transpose(0, 1), w_uv.transpose(1, 2))
        return out.transpose(0, 1).reshape(B, T, h, -1)

    def forward(self, x: Tensor, rope: Tensor, cache: LatentCache | None = None, layer: int = 0) -> Tensor:
        """x [B, T, H] -> [B, T, H]. With a cache the T tokens come after the `cache.length` that it holds, and are written to it."""
        q_nope, q_rope, latent = self.project(x, rope)
        if cache is None or cache.length == 0:
            out = self.naive(q_nope, q_rope, latent)
        if cache is not None:
            T, start = x.shape[1], cache.length
            cache.rows[layer][:, start : start + T] = latent
            if start > 0:
                mask = None if T == 1 else torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
                out = self.absorbed(q_nope, q_rope, cache.rows[layer][:, : start + T], mask)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). x [..., H] -> [..., H]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """The gate (V3 eq. 12-20): affinities, a bias that only selects, group-limited top-k, normalised and scaled weights.
    While the module trains it adds up `load` [E], tokens per expert since the last `update_bias`, and leaves the balance loss of its
    last call in `balance_loss` (to be multiplied by alpha)."""

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)
        self.balance_loss: Tensor | float = 0.0
        self.pool: Callable[[Tensor], Tensor] = torch.clone  # counts of a batch -> their mean over the processes that share it

    def select(self, scores: Tensor) -> Tensor:
        """scores [N, E] -> indices [N, K] of the chosen experts: those of the best `topk_group` groups by the sum of their top 2."""
        cfg = self.config
        choice = scores + self.e_score_correction_bias
        if cfg.topk_group < cfg.n_group:
            groups = choice.unflatten(-1, (cfg.n_group, -1))
            best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(cfg.topk_group, dim=-1, sorted=False).indices
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            choice = groups.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        return choice.topk(cfg.num_experts_per_tok, dim=-1, sorted=False).indices

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, H] -> weights [N, K] and expert indices [N, K], in float32 whatever the autocast."""
        cfg = self.config
        with torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext():
            logits = F.linear(x.flatten(0, -2).float(), self.weight.float())
            scores = logits.sigmoid() if cfg.scoring_func == "sigmoid" else logits.softmax(dim=-1)
            with torch.no_grad():
                index = self.select(scores)
            weights = scores.gather(-1, index)
            if cfg.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            if self.training:
                self._watch(scores, index, x.shape[0])
            return weights * cfg.routed_scaling_factor, index

    def _watch(self, scores: Tensor, index: Tensor, sequences: int) -> None:
        cfg = self.config
        parts = sequences if cfg.seq_aux else 1  # V3 eq. 17-20: within each sequence; Switch and Mixtral: within the batch
        E, tokens = cfg.n_routed_experts, scores.shape[0] // parts
        counts = torch.zeros(parts, E, device=scores.device).scatter_add_(1, index.view(parts, -1), scores.new_ones(parts, index.numel() // parts))
        share = (counts if cfg.seq_aux else self.pool(counts)) * (E / (cfg.num_experts_per_tok * tokens))
        affinity = (scores / scores.sum(dim=-1, keepdim=True)).view(parts, tokens, E).mean(dim=1)
        self.balance_loss = (share * affinity).sum(dim=-1).mean()
        self.load += counts.sum(dim=0)

    @torch.no_grad()
    def update_bias(self, gamma: float) -> None:
        """b_i += gamma * sign(mean load - load_i) (V3 section 2.1.2), then start counting anew."""
        self.e_score_correction_bias += gamma * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class _Dispatch(torch.autograd.Function):
    """x [N, H] -> its rows in expert order [N*K, H]. The gradient is a gather and a sum, not a scatter: 4x faster on a CPU, and exact."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.ways = order, place, k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Combine.apply(grad, *ctx.ways), None, None, None


class _Combine(torch.autograd.Function):
    """y [N*K, H] in expert order -> the sum of each token's K rows [N, H]: the transpose of `_Dispatch`, so each is the other's gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.ways = order, place, k
        return y.index_select(0, place).unflatten(0, (-1, k)).sum(dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Dispatch.apply(grad, *ctx.ways), None, None, None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [M, in], sorted by expert, each times its own expert's weight [E, out, in]; expert e has rows up to ends[e]. -> [M, out]."""
    if all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]):  # what grouped_mm asks of row strides
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ w.T for rows, w in zip(x.split(counts), weight.unbind(0), strict=True)])


class Experts(nn.Module):
    """All routed experts of a layer, their SwiGLU weights stacked: gate_up_proj [E, 2f, H], down_proj [E, H, f]."""

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.precision: Any = None  # as in `Linear`
        E, f, H = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * f, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, f))

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [N, H], weights and index [N, K] -> the weighted sum of the chosen experts [N, H]. No token is dropped."""
        k, up, down = index.shape[-1], self.gate_up_proj, self.down_proj
        if torch.is_autocast_enabled(x.device.type):  # grouped_mm does not take part in autocast
            x, up, down = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, up, down))
        if x.shape[0] == 1 and not (torch.is_grad_enabled() or self.precision):  # one token: its experts in turn, nothing sorted, no weights copied
            out = torch.zeros_like(x)
            for e, weight in zip(index[0].tolist(), weights[0].to(x.dtype), strict=True):
                gate, up_ = F.linear(x, up[e]).chunk(2, dim=-1)
                out = torch.addmm(out, F.silu(gate) * up_ * weight, down[e].T)
            return out
        order = index.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        ends = torch.bincount(index.flatten(), minlength=up.shape[0]).cumsum(0).to(torch.int32)
        # V3 section 3.3.3: what is sent to the experts, and the gradient that is, have powers of two for scales
        first, second = (self.precision.pow2(sent).linear for sent in "xg") if self.precision else (grouped_linear, grouped_linear)
        gate, up = first(_Dispatch.apply(x, order, place, k), up, ends).chunk(2, dim=-1)
        act = F.silu(gate) * up * weights.flatten().index_select(0, order).unsqueeze(-1).to(up.dtype)
        return _Combine.apply(second(act, down, ends), order, place, k)


class MoE(nn.Module):
    """DeepSeekMoE (V3 eq. 12): the shared experts see every token, the router chooses K of the E others."""

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]."""
        weights, index = self.gate(x)
        out = self.experts(x.flatten(0, -2), weights, index).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward is dense in the first layers and a MoE after them."""

    def __init__(self, config: V3Config, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, x: Tensor, rope: Tensor, cache: LatentCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTP(nn.Module):
    """One depth of multi-token prediction (V3 section 2.2, eq. 21-23): the previous depth's state and the next token's embedding, both
    normalised, projected and sent through a block of its own. Embedding and head are the model's."""

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, dense=False)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)  # `shared_head.norm` in the files

    def forward(self, hidden: Tensor, embedded: Tensor, rope: Tensor, cache: LatentCache | None = None) -> Tensor:
        """hidden [B, T, H] of position i, embedded [B, T, H] of token i + k -> state [B, T, H] that predicts token i + k + 1."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))  # the embedding half comes first, as in the files
        return self.norm(self.block(x, rope, cache))


class Speculation(NamedTuple):
    """What `generate_with_mtp` counted: forward passes of the main model, tokens drafted, drafts accepted."""
    forwards: int
    drafted: int
    accepted: int


class DeepSeekV3(nn.Module):
    """The whole model: `model(input_ids [B, T]) -> logits [B, T, V]`. With a `precision` (helpers.fp8.Recipe) products round their operands."""

    def __init__(self, config: V3Config, precision: Any = None) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, dense=n < config.first_k_dense_replace) for n in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTP(config) for _ in range(config.num_nextn_predict_layers))
        freq, self.rope_scale, _ = rope_frequencies(config)
        self.register_buffer("inv_freq", freq, persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:  # norms stay 1; everything else is N(0, initializer_range) as in V3 section 4.2
                    parameter.normal_(0.0, config.initializer_range)
        for name, module in self.named_modules() if precision else ():
            if isinstance(module, (Linear, Experts)):
                module.precision = precision.after_attention() if name.endswith("o_proj") else precision

    def rope(self, start: int, length: int) -> Tensor:
        """Turns [length, dr/2] of positions start, start + 1, ... as complex numbers, for `rotate`."""
        angle = torch.arange(start, start + length, device=self.inv_freq.device, dtype=torch.float32)[:, None] * self.inv_freq
        return torch.polar(torch.full_like(angle, self.rope_scale), angle)

    def routers(self) -> list[Router]:
        """The gates of all MoE layers in order, those of MTP last."""
        return [m for m in self.modules() if isinstance(m, Router)]

    def hidden(self, input_ids: Tensor, cache: LatentCache | None = None) -> Tensor:
        """input_ids [B, T] -> last hidden state after the final norm [B, T, H]. ValueError for a wrong shape or too long a text."""
        start = cache.length if cache else 0
        self._check(input_ids, start)
        x, rope = self.embed_tokens(input_ids), self.rope(start, input_ids.shape[1])
        for n, block in enumerate(self.layers):
            x = block(x, rope, cache, n)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)

    def forward(self, input_ids: Tensor, cache: LatentCache | None = None) -> Tensor:
        """input_ids [B, T] -> logits [B, T, V]; with a cache, of the T tokens that follow what it holds."""
        return self.lm_head(self.hidden(input_ids, cache))

    def predict_further(self, hidden: Tensor, input_ids: Tensor) -> list[Tensor]:
        """MTP logits for k = 1..D (V3 eq. 21-23): entry k-1 is [B, T-k, V], its position i predicts token i + k + 1 of the text."""
        out = []
        for k, module in enumerate(self.mtp, start=1):
            embedded = self.embed_tokens(input_ids[:, k:])
            hidden = module(hidden[:, : embedded.shape[1]], embedded, self.rope(0, embedded.shape[1]))
            out.append(self.lm_head(hidden))
        return out

    def _check(self, input_ids: Tensor, more: int) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be whole numbers of shape [batch, tokens > 0], not {input_ids.dtype} {list(input_ids.shape)}")
        if input_ids.shape[1] + more > self.config.max_position_embeddings:
            raise ValueError(f"{input_ids.shape[1] + more} tokens do not fit max_position_embeddings={self.config.max_position_embeddings}: "
                             "shorten the prompt, ask for fewer tokens, or extend the context with YaRN")

    def _start(self, input_ids: Tensor, max_new_tokens: int, temperature: float) -> None:
        self._check(input_ids, max_new_tokens)
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.config.vocab_size:
            raise ValueError(f"input_ids must lie in 0..{self.config.vocab_size - 1} (vocab_size={self.config.vocab_size})")
        if max_new_tokens < 0 or not math.isfinite(temperature) or temperature < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} and temperature={temperature} must be at least 0")

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0, eos_token_id: int | None = None,
                 generator: torch.Generator | None = None, stream: Callable[[int], None] | None = None, log_probs: Tensor | None = None) -> Tensor:
        """Continue B prompts of equal length: input_ids [B, T] -> [B, T + new], new <= max_new_tokens. Greedy at temperature 0.
        The latent cache is allocated once; a row that has written `eos_token_id` leaves the batch and is filled up with it.
        `stream` is called with each new token (one row only). `log_probs` [B, max_new_tokens] is filled with those of the tokens written,
        at temperature 1 whatever they were drawn at. ValueError when prompt and answer do not fit the context."""
        self._start(input_ids, max_new_tokens, temperature)
        B, T = input_ids.shape
        if stream is not None and B != 1:
            raise ValueError(f"stream shows one row, the batch has {B}: pass one prompt or leave stream out")
        out = input_ids.new_full((B, T + max_new_tokens), 0 if eos_token_id is None else eos_token_id)
        out[:, :T] = input_ids
        if max_new_tokens == 0:
            return out
        cache = LatentCache(self.config, len(self.layers), B, T + max_new_tokens - 1, self.lm_head.weight)
        alive, open_ = torch.arange(B, device=input_ids.device), None
        logits = self.lm_head(self.hidden(input_ids, cache)[:, -1])
        for position in range(T, T + max_new_tokens):
            token = sample(logits, temperature, generator)
            if log_probs is not None:
                log_probs[alive, position - T] = logits.float().log_softmax(dim=-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
            if open_ is not None:  # rows that are done but not yet taken out write nothing but eos
                token = torch.where(open_, token, eos_token_id)
            out[alive, position] = token
            if stream is not None:
                stream(int(token))
            if eos_token_id is not None:
                open_ = token != eos_token_id
                left = int(open_.sum())
                if left == 0:
                    return out[:, : position + 1]
                if left <= 0.8 * len(alive):  # worth a copy of the cache
                    rows = open_.nonzero().squeeze(-1)
                    alive, token, open_ = alive[rows], token[rows], open_[rows]
                    cache.keep(rows)
            if position + 1 < T + max_new_tokens:
                logits = self.lm_head(self.hidden(token.unsqueeze(1), cache)[:, -1])
        return out

    @torch.inference_mode()
    def generate_with_mtp(self, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None) -> tuple[Tensor, Speculation]:
        """Greedy decoding of one row where the first MTP module drafts the token after next and the main model checks it (V3 section 5.4.3).

        A draft is kept only where the main model would have written the same, so the text is that of `generate`. -> ids, Speculation.
        """
        self._start(input_ids, max_new_tokens, 0.0)
        if input_ids.shape[0] != 1 or not self.mtp:
            raise ValueError("drafting needs one row and a model with num_nextn_predict_layers of at least 1")
        if max_new_tokens == 0:
            return input_ids, Speculation(0, 0, 0)
        end = input_ids.shape[1] + max_new_tokens
        main = LatentCache(self.config, len(self.layers), 1, end + 1, self.lm_head.weight)
        side = LatentCache(self.config, 1, 1, end + 1, self.lm_head.weight)
        text = input_ids[0].tolist()
        hidden = self.hidden(input_ids, main)
        text.append(int(self.lm_head(hidden[:, -1]).argmax()))
        forwards, drafted, accepted = 1, 0, 0
        while len(text) < end and text[-1] != eos_token_id:
            seen = hidden.shape[1]  # states of checked tokens; each meets the embedding of the token after it
            after = torch.tensor([text[-seen:]], device=input_ids.device)
            draft_state = self.mtp[0](hidden, self.embed_tokens(after), self.rope(side.length, seen), side)[:, -1]
            side.length += seen
            draft = int(self.lm_head(draft_state).argmax())
            two = torch.tensor([[text[-1], draft]], device=input_ids.device)
            hidden = self.hidden(two, main)
            first, second = self.lm_head(hidden[0]).argmax(dim=-1).tolist()
            written = [first, second] if first == draft and first != eos_token_id else [first]
            written = written[: end - len(text)]
            text += written
            main.length -= 2 - len(written)  # forget the state of a draft that was wrong
            hidden = hidden[:, : len(written)]
            forwards, drafted, accepted = forwards + 1, drafted + 1, accepted + len(written) - 1
        return torch.tensor([text], device=input_ids.device), Speculation(forwards, drafted, accepted)


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """logits [B, V] -> token ids [B]: the largest at temperature 0, else drawn from softmax(logits / temperature) by its inverse CDF."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    u = torch.rand(logits.shape[0], 1, generator=generator, device=logits.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
