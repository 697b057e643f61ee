"""Small things that many tests build: configs, models, token ids, text folders."""

import random
from pathlib import Path

from helpers.v3 import DeepSeekV3, V3Config, checkpoint

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}
MSCALES = (
    {},
    {"mscale": 1.0, "mscale_all_dim": 1.0},
    {"mscale": 0.7, "mscale_all_dim": 1.3},
    {"mscale_all_dim": 0.8},
    {"mscale": 0.8},
    {"beta_fast": 4, "beta_slow": 2, "attention_factor": 0.9},
)


def small(**changes) -> V3Config:
    """A config in which every part is present and no two sizes are equal."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 14,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return V3Config(**(sizes | changes))


def random_config(seed: int) -> V3Config:
    """A config with drawn sizes; the listed choices go round with the seed.

    So range(24) holds each of them.
    """
    rng = random.Random(seed)
    groups = (1, 2, 4)[seed % 3]
    per_group = rng.randint(2, 5)
    topk_group = rng.randint(1, groups)
    yarn = YARN | MSCALES[seed // 4 % len(MSCALES)]
    return V3Config(
        vocab_size=rng.randint(30, 90),
        hidden_size=rng.randint(16, 40),
        intermediate_size=rng.randint(16, 50),
        moe_intermediate_size=rng.choice([8, 12, 7, 13, 18]),
        num_hidden_layers=rng.randint(2, 3),
        num_attention_heads=rng.randint(1, 4),
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=topk_group,
        n_shared_experts=1 + seed // 4 % 2,
        num_experts_per_tok=rng.randint(1, min(4, topk_group * per_group)),
        first_k_dense_replace=seed // 3 % 3,
        norm_topk_prob=seed % 5 != 0,
        routed_scaling_factor=rng.uniform(0.5, 2.5),
        q_lora_rank=None if seed % 2 else rng.randint(5, 20),
        kv_lora_rank=rng.randint(5, 20),
        qk_rope_head_dim=2 * rng.randint(1, 6),
        qk_nope_head_dim=rng.randint(3, 12),
        v_head_dim=rng.randint(3, 30),
        num_nextn_predict_layers=seed % 3 % 2,
        max_position_embeddings=64,
        initializer_range=rng.uniform(0.1, 0.3),
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        rope_theta=rng.choice([50.0, 10000.0]),
        rope_scaling=yarn if seed // 2 % 2 else None,
    )


def draw(config: V3Config, seed: int = 0) -> DeepSeekV3:
    """A model in eval mode whose selection biases and norms are random too."""
    torch.manual_seed(seed)
    model = DeepSeekV3(config).eval()
    with torch.no_grad():
        for router in model.routers():
            router.e_score_correction_bias.normal_(0, 0.3)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def ids(config: V3Config, batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def theirs_of(model: DeepSeekV3, folder: Path) -> DeepseekV3ForCausalLM:
    """transformers' model from the files that we save."""
    checkpoint.save(model, folder)
    theirs = DeepseekV3ForCausalLM.from_pretrained(
        folder / "latest", attn_implementation="eager", experts_implementation="eager"
    )
    return theirs.eval()


TEXT_WORDS = [
    "def",
    "return",
    "alpha",
    "beta",
    "gamma",
    "self.value",
    "12",
    "3456",
    "é",
    "漢字",
    "😀",
    "#",
    "note",
]


def write_texts(folder: Path, n: int = 40) -> Path:
    """A folder of n small text files; -> the folder."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        lines = []
        for j in range(30):
            words = [TEXT_WORDS[(i + j * k) % len(TEXT_WORDS)] for k in range(6)]
            lines.append(" " * (4 * (j % 3)) + " ".join(words))
        path = folder / f"text{i:02}.txt"
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
    return folder
