"""DeepSeek-V3, assembled (arXiv:2412.19437, section 2): blocks, MTP, the whole model.

Shapes: B sequences, T tokens, H hidden_size, V vocab_size, D num_nextn_predict_layers,
dr qk_rope_head_dim. Module names are those of the published files.
"""

from helpers.checks import need
from helpers.v3.attention import MLA, LatentCache
from helpers.v3.config import V3Config
from helpers.v3.experts import MLP, Float32Buffers, MoE, Router, Routing
from helpers.v3.norm import RMSNorm
from helpers.v3.rope import rope_frequencies

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    The feed-forward is dense in the first layers and a mixture of experts after them.
    """

    def __init__(self, config: V3Config, dense: bool) -> None:
        super().__init__()
        H = config.hidden_size
        self.input_layernorm = RMSNorm(H, eps=config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(H, eps=config.rms_norm_eps)
        self.mlp: MLP | MoE
        if dense:
            self.mlp = MLP(H, config.intermediate_size)
        else:
            self.mlp = MoE(config)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        cache: LatentCache | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Routing | None]:
        """x [B, T, H] -> [B, T, H] and, of a mixture, how its tokens were routed."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, routing = self.mlp(normed)
            return x + out, routing
        return x + self.mlp(normed), None


class MTP(nn.Module):
    """One depth of multi-token prediction (V3 section 2.2, eq. 21-23).

    The state of the depth before and the embedding of the next token, both normalised,
    are projected together and go through a block of their own. Embedding and output
    head are the model's.
    """

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        H = config.hidden_size
        self.enorm = RMSNorm(H, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(H, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * H, H, bias=False)
        self.block = Block(config, dense=False)
        # `shared_head.norm` in the published files
        self.norm = RMSNorm(H, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        rope: Tensor,
        cache: LatentCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """hidden [B, T, H] of position i, embedded [B, T, H] of token i + k.

        -> state [B, T, H] that predicts token i + k + 1, and the block's routing.
        """
        # the embedding's half comes first, as in the published files
        both = torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)
        x, routing = self.block(self.eh_proj(both), rope, cache)
        return self.norm(x), routing


class DeepSeekV3(Float32Buffers):
    """The whole model: `model(input_ids [B, T]) -> logits [B, T, V]`."""

    inv_freq: Tensor

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.config = config
        H = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, H)
        self.layers = nn.ModuleList(
            Block(config, dense=n < config.first_k_dense_replace)
            for n in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(H, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(H, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MTP(config) for _ in range(config.num_nextn_predict_layers)
        )
        frequencies, self.rope_scale, _ = rope_frequencies(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self._draw_weights()

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """Matrices from N(0, initializer_range), norms 1 (V3 section 4.2)."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.initializer_range)

    def forward(self, input_ids: Tensor, cache: LatentCache | None = None) -> Tensor:
        """input_ids [B, T] -> logits [B, T, V].

        With a cache the T tokens follow what it holds, and it grows by them.
        """
        return self.lm_head(self.hidden(input_ids, cache))

    def hidden(self, input_ids: Tensor, cache: LatentCache | None = None) -> Tensor:
        """input_ids [B, T] -> the last hidden state after the final norm [B, T, H]."""
        return self.trunk(input_ids, cache)[0]

    def trunk(
        self, input_ids: Tensor, cache: LatentCache | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """`hidden`, and the routings of all MoE layers in order (MTP's left out).

        Raises ValueError for ids of a wrong shape or dtype and for a text that is
        longer than the context.
        """
        start = cache.length if cache else 0
        T = check_input_ids(self.config, input_ids, start)
        x = self.embed_tokens(input_ids)
        rope = self.rope(start, T)
        routings = []
        for n, block in enumerate(self.layers):
            x, routing = block(x, rope, cache, n)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += T
        return self.norm(x), routings

    def predict_further(
        self, hidden: Tensor, input_ids: Tensor
    ) -> tuple[list[Tensor], list[Routing]]:
        """MTP's logits for k = 1..D, and its routings (V3 eq. 21-23).

        hidden [B, T, H] is what `trunk` made of input_ids [B, T]. Entry k - 1 of the
        logits is [B, T - k, V]; its position i predicts token i + k + 1 of the text.
        """
        logits = []
        routings = []
        for k, module in enumerate(self.mtp, start=1):
            embedded = self.embed_tokens(input_ids[:, k:])
            T = embedded.shape[1]
            hidden, routing = module(hidden[:, :T], embedded, self.rope(0, T))
            logits.append(self.lm_head(hidden))
            if routing is not None:
                routings.append(routing)
        return logits, routings

    def rope(self, start: int, length: int) -> Tensor:
        """Turns [length, dr/2] of the positions from `start`, for `rope.rotate`."""
        device = self.inv_freq.device
        positions = torch.arange(
            start, start + length, device=device, dtype=torch.float32
        )
        angles = positions[:, None] * self.inv_freq
        return torch.polar(torch.full_like(angles, self.rope_scale), angles)

    def routers(self) -> list[Router]:
        """The gates of all MoE layers in order, those of MTP last."""
        return [module for module in self.modules() if isinstance(module, Router)]


def check_input_ids(config: V3Config, input_ids: Tensor, more: int) -> int:
    """T of input_ids [B, T]. ValueError if they, and `more` tokens, do not fit."""
    dtype = input_ids.dtype
    shape = list(input_ids.shape)
    whole = dtype in (torch.int64, torch.int32)
    need(
        whole and len(shape) == 2 and shape[1] > 0,
        "input_ids",
        f"{dtype} {shape}",
        "they must be whole numbers of shape [batch, tokens > 0]",
    )
    limit = config.max_position_embeddings
    if shape[1] + more > limit:
        raise ValueError(
            f"{shape[1] + more} tokens do not fit max_position_embeddings={limit}: "
            "shorten the prompt, ask for fewer tokens, or extend the context with YaRN"
        )
    return shape[1]
