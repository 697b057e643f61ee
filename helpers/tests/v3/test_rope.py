"""Frequencies, YaRN and the softmax scale, against transformers."""

import math

from helpers.tests.builders import MSCALES, YARN, small
from helpers.v3 import V3Config, rope_frequencies

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
)

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")


@pytest.mark.parametrize(
    "changes",
    [
        *MSCALES,
        {"original_max_position_embeddings": 4},
        {"beta_fast": 1, "beta_slow": 1},
        {"factor": 40, "original_max_position_embeddings": 4096},
        {"original_max_position_embeddings": 100000},
    ],
)
@pytest.mark.parametrize("theta", [3.0, 10000])
def test_yarn_frequencies_equal_transformers(changes, theta):
    config = small(rope_scaling=YARN | changes, rope_theta=theta, qk_rope_head_dim=16)
    rotary = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config.to_hf()))
    freq, scale, _ = rope_frequencies(config)
    assert torch.allclose(freq, rotary.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(rotary.attention_scaling)


BETAS = st.tuples(*(st.none() | st.floats(0.01, 200),) * 2).map(
    lambda pair: (
        pair if (pair[0] or 32) >= (pair[1] or 1) else (pair[1] or 1, pair[0] or 32)
    )
)


@pytest.mark.slow
@given(
    st.integers(1, 64),
    st.floats(1.01, 1e7),
    st.one_of(st.integers(1, 100), st.floats(1, 1e4), st.just(None)),
    st.integers(1, 200_000),
    BETAS,
    st.fixed_dictionaries(
        {},
        optional={
            "mscale": st.floats(0, 2),
            "mscale_all_dim": st.floats(0, 2),
            "attention_factor": st.floats(0.1, 3),
        },
    ),
)
@settings(max_examples=100, deadline=None)
def test_yarn_frequencies_equal_transformers_for_any_settings(
    pairs, theta, factor, original, betas, scales
):
    yarn = {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": betas[0],
        "beta_slow": betas[1],
    } | scales
    config = small(
        qk_rope_head_dim=2 * pairs,
        rope_theta=theta,
        rope_scaling=yarn,
        max_position_embeddings=3 * original,
    )
    freq, turn_scale, softmax_scale = rope_frequencies(config)
    expected, expected_scale = ROPE_INIT_FUNCTIONS["yarn"](
        DeepseekV3Config(**config.to_hf())
    )
    torch.testing.assert_close(freq, expected, rtol=1e-5, atol=0)
    assert turn_scale == pytest.approx(expected_scale)
    plain = theta ** -(torch.arange(pairs) / pairs)
    stretched = plain / (factor or 3)
    assert (freq <= plain * 1.0001).all() and (
        freq >= stretched * 0.9999
    ).all()  # each pair is kept, stretched or between
    sharper = 0.1 * scales.get("mscale_all_dim", 0) * math.log(factor or 3) + 1
    assert softmax_scale * (
        config.qk_nope_head_dim + 2 * pairs
    ) ** 0.5 == pytest.approx(sharper**2)


def test_the_softmax_scale_of_the_671b_model_is_the_papers():
    assert rope_frequencies(V3Config.deepseek_v3())[2] == pytest.approx(
        192**-0.5 * 1.3689**2, rel=1e-4
    )
