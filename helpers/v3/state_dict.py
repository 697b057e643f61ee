"""Our tensors under their published names.

    lm_head.weight                        the same
    mtp.0.norm.weight                     model.layers.61.shared_head.norm.weight
    mtp.0.enorm.weight                    model.layers.61.enorm.weight
    mtp.0.block.self_attn.o_proj.weight   model.layers.61.self_attn.o_proj.weight
    norm.weight (and all others)          model.norm.weight

MTP's layers follow the last layer of the model. Stacked experts are taken apart:

    layers.3.mlp.experts.gate_up_proj     model.layers.3.mlp.experts.0.gate_proj.weight
      [E, 2f, H]                          model.layers.3.mlp.experts.0.up_proj.weight
                                          model.layers.3.mlp.experts.1. ... [f, H]
    layers.3.mlp.experts.down_proj        model.layers.3.mlp.experts.0.down_proj.weight
      [E, H, f]                           ... [H, f]
"""

import re
from collections.abc import Iterator, Mapping

from helpers.v3.config import V3Config

from torch import Tensor

# Weights that the published files hold in FP8.
IN_FP8 = re.compile(
    r".*\.(q|q_a|q_b|kv_b|o|gate|up|down)_proj\.weight"
    r"|.*\.kv_a_proj_with_mqa\.weight"
)
# What some published files (Moonlight, Kimi-K2) hold though it follows from the config.
RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def published(
    config: V3Config, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) for every tensor of the files but MTP's copies.

    `weights` are a model's under our names. The tensors are theirs or views of parts of
    them, so that what is written into one is written into the model.
    """
    for ours, tensor in weights.items():
        name = published_name(config, ours)
        if ".experts." in name:
            yield from _single_experts(name, tensor)
        else:
            yield name, tensor


def published_name(config: V3Config, ours: str) -> str:
    """The published name of a tensor; of stacked experts without their number."""
    if ours.startswith("lm_head"):
        return ours
    if not ours.startswith("mtp."):
        return f"model.{ours}"
    _, k, rest = ours.split(".", 2)
    layer = config.num_hidden_layers + int(k)
    if rest == "norm.weight":
        rest = "shared_head.norm.weight"
    return f"model.layers.{layer}.{rest.removeprefix('block.')}"


def _single_experts(name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices of each expert in a stack of all of them."""
    stem, kind = name.rsplit(".", 1)
    matrices = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    for e, expert in enumerate(stacked):
        for matrix, tensor in zip(matrices, expert.chunk(len(matrices)), strict=True):
            yield f"{stem}.{e}.{matrix}.weight", tensor


def copies(config: V3Config) -> dict[str, str]:
    """Published name -> the name it repeats: embedding and head in MTP's layers."""
    repeated = {}
    for k in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + k}"
        repeated[f"{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        repeated[f"{layer}.shared_head.head.weight"] = "lm_head.weight"
    return repeated
