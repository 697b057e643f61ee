"""MHA, GQA and MQA, against transformers' Llama and against MLA's place in a block."""

from helpers.checks import InputError
from helpers.v3 import DeepSeekV3, LatentCache, V3Config
from helpers.v3.gqa import GQA, GQAShape

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
)

H = 32
T = 9


def turns(dim):
    angles = torch.arange(T)[:, None] * 10_000.0 ** -(torch.arange(0, dim, 2) / dim)
    return torch.polar(torch.ones_like(angles), angles)


def even_first(weight, heads):
    """Rows of a projection, reordered from interleaved pairs to half-split ones."""
    by_head = weight.view(heads, -1, weight.shape[-1])
    order = [*range(0, by_head.shape[1], 2), *range(1, by_head.shape[1], 2)]
    return by_head[:, order].flatten(0, 1)


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["MQA", "GQA", "MHA"])
def test_it_is_llamas_attention(groups):
    torch.manual_seed(groups)
    d = 8
    ours = GQA(H, GQAShape(heads=4, groups=groups, qk_dim=d, v_dim=d, rope_dim=d))
    config = LlamaConfig(
        hidden_size=H,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=d,
        attn_implementation="eager",
    )
    theirs = LlamaAttention(config, layer_idx=0)
    with torch.no_grad():
        theirs.q_proj.weight.copy_(even_first(ours.q_proj.weight, 4))
        theirs.k_proj.weight.copy_(even_first(ours.k_proj.weight, groups))
        theirs.v_proj.weight.copy_(ours.v_proj.weight)
        theirs.o_proj.weight.copy_(ours.o_proj.weight)
    x = torch.randn(2, T, H)
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(T)[None])
    causal = torch.full((T, T), float("-inf")).triu(1)
    expected = theirs(x, position_embeddings=rotary, attention_mask=causal[None, None])
    torch.testing.assert_close(ours(x, turns(d)), expected[0], atol=1e-5, rtol=1e-4)


def test_keys_may_be_wider_than_values_and_only_their_end_is_turned():
    torch.manual_seed(0)
    shape = GQAShape(heads=4, groups=2, qk_dim=12, v_dim=5, rope_dim=4)
    layer = GQA(H, shape)
    x = torch.randn(1, T, H)
    out = layer(x, turns(4))
    assert out.shape == x.shape
    assert shape.cached() == 2 * (12 + 5)

    # with that end cut out of the keys, positions make no difference
    with torch.no_grad():
        layer.k_proj.weight.view(2, 12, H)[:, 8:] = 0
    moved = turns(4).roll(3, dims=0)
    torch.testing.assert_close(layer(x, turns(4)), layer(x, moved))


def test_no_token_sees_a_later_one():
    layer = GQA(H, GQAShape(4, 2, 8, 8, 4))
    x = torch.randn(1, T, H)
    changed = x.clone()
    changed[:, -1] += 1
    before, after = layer(x, turns(4)), layer(changed, turns(4))
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_it_takes_the_place_of_mla_in_a_model():
    config = V3Config.tiny(num_nextn_predict_layers=0, num_hidden_layers=2)
    model = DeepSeekV3(config)
    for block in model.layers:
        block.self_attn = GQA(config.hidden_size, GQAShape(4, 2, 48, 32, 16))
    ids = torch.randint(config.vocab_size, (2, T))
    model(ids).sum().backward()
    assert model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    cache = LatentCache(config, 2, 2, T, torch.empty(0))
    with pytest.raises(InputError, match="cache"):
        model(ids, cache)


@pytest.mark.parametrize(
    ("shape", "field"),
    [(GQAShape(4, 3, 8, 8, 4), "groups=3"), (GQAShape(4, 2, 8, 8, 10), "rope_dim=10")],
)
def test_sizes_that_cannot_work_are_named(shape, field):
    with pytest.raises(InputError, match=f"{field} cannot work"):
        GQA(H, shape)
