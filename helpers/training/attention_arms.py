"""Models that differ in their attention alone, trained on the same text (notebook 02).

All arms are dense models of the same width and depth. They have the same number of
parameters, or feed-forwards of the same width. Queries are not compressed in any of
them, since the cache does not hold queries.
"""

import random
from dataclasses import asdict, dataclass, replace

from helpers.checks import Count, Whole, check_fields, need
from helpers.training import pretrain, runs
from helpers.training.corpus import Corpus
from helpers.training.loop import History
from helpers.training.world import World
from helpers.v3 import MLA, DeepSeekV3, V3Config
from helpers.v3.gqa import GQA, GQAShape

import torch
from torch import nn


@dataclass(frozen=True)
class Arm:
    """One kind of attention, by its sizes.

    groups = heads is MHA, 1 is MQA; 0 is MLA, with the sizes of the config.
    equal_parameters: what the attention saves against MLA goes into the feed-forward,
    or what it needs is taken from there; False leaves the feed-forward as it is.
    Two changes separate MHA from MLA step by step: one_position_key gives the heads of
    the other kinds one turned key, as MLA has; latent_norm=False takes the RMSNorm off
    MLA's latent.
    """

    name: str
    groups: Whole = 0
    heads: Count = 4
    qk_dim: Count = 48
    v_dim: Count = 32
    equal_parameters: bool = True
    one_position_key: bool = False
    latent_norm: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.groups == 0:
            one = self.one_position_key
            need(not one, "one_position_key", one, "MLA has one: leave it out")
        else:
            norm = self.latent_norm
            need(norm, "latent_norm", norm, "only MLA has a latent: leave it out")

    def cached(self, config: V3Config) -> int:
        """Numbers that a layer keeps per token."""
        if self.groups == 0:
            return config.kv_lora_rank + config.qk_rope_head_dim
        return self.gqa_shape(config).cached()

    def gqa_shape(self, config: V3Config) -> GQAShape:
        """The layer's sizes, with as many turned numbers in a key as MLA has."""
        dr = config.qk_rope_head_dim
        return GQAShape(
            self.heads,
            self.groups,
            self.qk_dim,
            self.v_dim,
            dr,
            self.one_position_key,
        )


def build(arm: Arm, config: V3Config, seed: int) -> DeepSeekV3:
    """The arm's model, with its feed-forward as wide as the parameters allow.

    config: of the arm with MLA; all of its layers must be dense. The other arms get the
    `intermediate_size` that brings them closest to its number of parameters, or keep
    that of the config (`Arm.equal_parameters`).
    """
    dense = config.first_k_dense_replace >= config.num_hidden_layers
    need(dense, "first_k_dense_replace", config.first_k_dense_replace, "all dense")
    model = DeepSeekV3(config)
    if arm.groups > 0:
        layers = [GQA(config.hidden_size, arm.gqa_shape(config)) for _ in model.layers]
        wider = 0
        if arm.equal_parameters:
            saved = _weights_of(MLA(config)) - _weights_of(layers[0])
            wider = round(saved / (3 * config.hidden_size))
        model = DeepSeekV3(
            config.with_(intermediate_size=config.intermediate_size + wider)
        )
        for block, layer in zip(model.layers, layers, strict=True):
            block.self_attn = layer
    if not arm.latent_norm:
        for module in model.modules():
            if isinstance(module, MLA):
                module.register_module("kv_a_layernorm", nn.Identity())
    _draw(model, seed)
    return model


def _weights_of(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


@torch.no_grad()
def _draw(model: DeepSeekV3, seed: int) -> None:
    """Draw every matrix from the seed and its own name.

    So arms start from the same numbers wherever they have a matrix of the same name and
    shape.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            drawn_from = random.Random(f"{seed} {name}").getrandbits(63)
            generator = torch.Generator().manual_seed(drawn_from)
            parameter.normal_(0.0, model.config.initializer_range, generator=generator)


def train(
    arm: Arm, config: V3Config, corpus: Corpus, settings: pretrain.Settings
) -> tuple[DeepSeekV3, History]:
    """The arm trained from `settings.seed`, or the finished run of exactly this."""
    model = build(arm, config, settings.seed)
    folder = runs.run_dir(
        "attention",
        arm=asdict(arm),
        config=config,
        settings=settings,
        corpus=corpus.hash,
    )
    trainer = pretrain.Pretrainer(model, corpus, settings, World())
    plan = replace(trainer.plan(arm.name, folder), module=__name__)
    return model, trainer.follow(plan)
