"""The assembled model: MTP, sizes, precision, parameters of the 671B model."""

from helpers.evidence.facts import V3_CONFIG, fact
from helpers.tests.builders import draw, ids, small
from helpers.training import pretrain
from helpers.v3 import DeepSeekV3, V3Config, checkpoint, generate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")


# --- multi-token prediction


@torch.no_grad()
def test_mtp_depths_have_the_papers_shapes():
    config = small(num_nextn_predict_layers=2)
    model, tokens = draw(config), ids(config, 2, 11)
    logits, routings = model.predict_further(model.hidden(tokens), tokens)
    assert [tuple(k.shape) for k in logits] == [(2, 10, 61), (2, 9, 61)]
    assert [len(routing.chosen) for routing in routings] == [20, 18]
    without = draw(small(num_nextn_predict_layers=0))
    assert without.predict_further(torch.zeros(2, 11, 24), tokens) == ([], [])


@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_mtp_sees_the_tokens_up_to_i_plus_k_and_not_its_target(k):
    config, i = small(num_nextn_predict_layers=2), 5
    model, tokens = draw(config), ids(config, 1, 14)

    def at(text):
        logits, _ = model.predict_further(model.hidden(text), text)
        return logits[k - 1][0, i]

    before = at(tokens)
    for place in range(i + k + 1, 14):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % config.vocab_size
        assert torch.allclose(at(changed), before, atol=1e-6), place
    changed = tokens.clone()
    changed[0, i + k] = (changed[0, i + k] + 1) % config.vocab_size
    assert not torch.allclose(at(changed), before, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast_to_bfloat16_stays_near_float32():
    config = small(hidden_size=32, moe_intermediate_size=16, kv_lora_rank=16)
    model, tokens = draw(config), ids(config, 2, 9)
    right = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
    assert (logits - right).abs().mean() < 0.1 * right.std()
    assert all(
        p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )


# --- the 671B model


def numbers_of(c):
    """(model, MTP, published files): numbers of a config, written out by hand.

    The selection bias counts in the files only.
    """
    H, h, E = c.hidden_size, c.num_attention_heads, c.n_routed_experts
    qk = c.qk_nope_head_dim + c.qk_rope_head_dim
    attention = H * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * h * qk
    attention += (
        H * (c.kv_lora_rank + c.qk_rope_head_dim)
        + c.kv_lora_rank
        + c.kv_lora_rank * h * (c.qk_nope_head_dim + c.v_head_dim)
    )
    attention += h * c.v_head_dim * H
    dense = 3 * H * c.intermediate_size
    moe = (E + c.n_shared_experts) * 3 * H * c.moe_intermediate_size + E * H
    block = attention + 2 * H
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace
    ends = 2 * c.vocab_size * H
    whole = (
        ends
        + H
        + c.num_hidden_layers * block
        + c.first_k_dense_replace * dense
        + moe_layers * moe
    )
    mtp = 2 * H * H + 3 * H + block + moe
    return whole, mtp, whole + mtp + ends + (moe_layers + 1) * E


@pytest.mark.slow
def test_the_671b_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = DeepSeekV3(V3Config.from_hf(V3_CONFIG))
    mtp = sum(p.numel() for p in model.mtp.parameters())
    whole = sum(p.numel() for p in model.parameters()) - mtp
    files = checkpoint.published_parameters(model)
    assert (
        (whole, mtp, files)
        == numbers_of(model.config)
        == (671_026_404_352, 11_610_067_968, 684_489_845_504)
    )
    for count, name in (
        (whole, "v3.recomputed_total"),
        (mtp, "v3.mtp_unique_recomputed"),
        (files, "v3.hf_recomputed"),
    ):
        assert round(count / 1e9, 2) * 1e9 == pytest.approx(fact(name).value, abs=1)


@st.composite
def valid_configs(draw_):
    def size(low, high):
        return draw_(st.integers(low, high))

    groups, per_group, layers = size(1, 4), size(2, 4), size(1, 3)
    topk_group = size(1, groups)
    yarn = {
        "type": "yarn",
        "factor": draw_(st.floats(1, 1e6)),
        "original_max_position_embeddings": size(1, 5000),
    }
    optional = {
        "mscale": st.floats(0, 2),
        "mscale_all_dim": st.floats(0, 2),
        "beta_slow": st.just(2),
    }
    yarn |= draw_(st.fixed_dictionaries({}, optional=optional))
    return V3Config(
        vocab_size=size(1, 20),
        hidden_size=size(1, 20),
        intermediate_size=size(1, 20),
        moe_intermediate_size=size(1, 9),
        num_hidden_layers=layers,
        num_attention_heads=size(1, 3),
        n_shared_experts=size(0, 2),
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=size(1, topk_group * per_group),
        kv_lora_rank=size(1, 9),
        q_lora_rank=draw_(st.none() | st.integers(1, 9)),
        qk_rope_head_dim=2 * size(1, 4),
        v_head_dim=size(1, 20),
        qk_nope_head_dim=size(1, 9),
        first_k_dense_replace=size(0, layers),
        norm_topk_prob=draw_(st.booleans()),
        scoring_func=draw_(st.sampled_from(["sigmoid", "softmax"])),
        seq_aux=draw_(st.booleans()),
        num_nextn_predict_layers=size(0, 2),
        max_position_embeddings=16,
        rope_theta=draw_(st.floats(1.01, 1e6)),
        rope_scaling=draw_(st.none() | st.just(yarn)),
    )


@pytest.mark.slow
@given(valid_configs())
@settings(max_examples=40, deadline=None)
def test_a_valid_config_builds_trains_and_writes(config):
    model = DeepSeekV3(config).train()
    tokens = ids(config, 2, 7)
    main, mtp, balance, _ = pretrain.losses(model, tokens)
    (main + mtp + balance).backward()
    assert (
        all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        and main.isfinite()
        and mtp.isfinite()
    )
    model.eval()
    assert model(tokens).shape == (2, 7, config.vocab_size) and generate(
        model, tokens, 3
    ).shape == (2, 10)


@given(st.integers(1, 100), st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_a_text_longer_than_the_context_is_an_error_and_one_that_fits_is_not(
    length, context
):
    model = DeepSeekV3(small(max_position_embeddings=context, num_hidden_layers=1))
    tokens = torch.zeros(1, length, dtype=torch.long)
    if length > context:
        with pytest.raises(ValueError, match=f"max_position_embeddings={context}"):
            model(tokens)
    else:
        assert model(tokens).shape == (1, length, 61)


# --- precision


def test_what_must_stay_float32_does_so_in_bfloat16():
    """Frequencies and the expert bias: bfloat16 would lose angles and balance steps."""
    config = small()
    right = draw(config)
    for change in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
    ):
        model = change(draw(config))
        assert model.lm_head.weight.dtype != torch.float32
        assert model.inv_freq.dtype == torch.float32
        assert torch.equal(model.inv_freq, right.inv_freq)
        assert torch.allclose(model.rope(2000, 1), right.rope(2000, 1), atol=1e-6)
        for router, other in zip(model.routers(), right.routers(), strict=True):
            bias = router.e_score_correction_bias
            assert torch.equal(bias, other.e_score_correction_bias)
            bias.fill_(1.0)
            router.update_bias(torch.tensor([1.0] * 7 + [0.0]), 0.001)
            assert bias[-1] == pytest.approx(1.001, abs=1e-6)
        assert model(ids(config, 1, 6)).dtype == model.lm_head.weight.dtype


def test_a_bfloat16_default_does_not_reach_frequencies_bias_or_counts():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = DeepSeekV3(small())
        tokens = ids(small(), 20, 64)
        _, routings = model.trunk(tokens)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model.inv_freq, draw(small()).inv_freq)
    assert model.routers()[0].e_score_correction_bias.dtype == torch.float32
    load = routings[0].load()
    assert load.dtype == torch.float32 and load.sum() == 20 * 64 * 3


def test_a_model_on_the_meta_device_comes_to_life_with_its_buffers():
    with torch.device("meta"):
        model = DeepSeekV3(small())
    model = model.to_empty(device="cpu")
    assert model.inv_freq.dtype == torch.float32 and model.inv_freq.device.type == "cpu"
