"""Latent attention: naive, absorbed, cached."""

from helpers.tests.builders import MSCALES, YARN, draw, ids, small
from helpers.v3 import LatentCache

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")


# --- attention and its cache


@pytest.mark.parametrize("q_lora_rank", [None, 14])
@pytest.mark.parametrize("v_head_dim", [8, 19])
@torch.no_grad()
def test_naive_and_absorbed_attention_agree_on_the_same_latents(
    q_lora_rank, v_head_dim
):
    config = small(q_lora_rank=q_lora_rank, v_head_dim=v_head_dim, rope_scaling=YARN)
    model = draw(config)
    attention = model.layers[0].self_attn
    q_nope, q_rope, latent = attention.project(torch.randn(2, 9, 24), model.rope(0, 9))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    whole = attention.naive(q_nope, q_rope, latent)
    assert whole.shape == (2, 9, 3, v_head_dim)
    assert torch.allclose(
        attention.absorbed(q_nope, q_rope, latent, causal[None]), whole, atol=1e-5
    )
    last = attention.absorbed(q_nope[:, -1:], q_rope[:, -1:], latent)
    assert torch.allclose(last, whole[:, -1:], atol=1e-5)
    tail = attention.naive(q_nope[:, 4:], q_rope[:, 4:], latent, causal[None, 4:])
    assert torch.allclose(tail, whole[:, 4:], atol=1e-5)


@torch.no_grad()
def test_the_cache_holds_latent_and_shared_key_and_nothing_else():
    config = small()
    model, cache = draw(config), LatentCache(config, 3, 2, 12, torch.zeros(1))
    assert cache.nbytes == 0
    model(ids(config, 2, 7), cache)
    per_token = 3 * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert (cache.length, cache.nbytes) == (7, 7 * 2 * per_token * 4)
    assert all(
        rows[:, :7].abs().sum(dim=-1).min() > 0 and rows[:, 7:].abs().sum() == 0
        for rows in cache.rows
    )
    assert (
        LatentCache(config, 3, 1, 12, torch.zeros(1, dtype=torch.bfloat16))
        .rows[0]
        .dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize(
    "chunks", [(1, 22), (10, 3, 10), (22, 1), (5, 1, 1, 16), (23,)]
)
@torch.no_grad()
def test_continuing_in_chunks_equals_the_full_forward(chunks):
    config = small(rope_scaling=YARN | MSCALES[2])
    model, tokens = draw(config), ids(config, 2, 23)
    cache = LatentCache(config, 3, 2, 23, model.lm_head.weight)
    parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(tokens), atol=1e-5)


@torch.no_grad()
def test_a_later_token_does_not_change_earlier_logits():
    config = small()
    model, tokens = draw(config), ids(config, 1, 12)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.allclose(
        before[:, :8], after[:, :8], atol=1e-6
    ) and not torch.allclose(before[:, 8], after[:, 8], atol=1e-3)
