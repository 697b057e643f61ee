"""V3Config: what its fields may hold, and which published files it understands."""

from typing import Any, get_args, get_type_hints

from helpers.checks import Positive, Range
from helpers.evidence.facts import V3_CONFIG, fact
from helpers.tests.builders import YARN, random_config, small
from helpers.tests.v3.published_configs import (
    KIMI_K2,
    MOONLIGHT,
    NATIVE_16B,
    NATIVE_236B,
    NATIVE_671B,
    NATIVE_V31,
    TINY_ALL_DENSE,
    TRANSFORMERS_4,
    V2_ROUTING,
    V32_INDEXER,
)
from helpers.v3 import DeepSeekV3, V3Config, rope_frequencies

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")

SEEDS = range(24)


# --- fields


KINDS = get_type_hints(V3Config, include_extras=True)


def whole_numbers_from(low):
    """The fields that hold whole numbers of at least `low`."""
    names = []
    for name, kind in KINDS.items():
        whole = get_args(kind)[:1] == (int,)
        if whole and kind.__metadata__[0].low == low:
            names.append(name)
    return names


COUNTS = whole_numbers_from(1)
WHOLES = whole_numbers_from(0)
FLAGS = [name for name, kind in KINDS.items() if kind is bool]
NUMBERS = [
    name
    for name, kind in KINDS.items()
    if kind == Positive or (get_args(kind)[:1] == (float,))
]

NOT_NUMBERS = st.sampled_from(
    [None, "8", True, [8], {}, float("nan"), float("inf"), -1, -0.5]
)
NOT_WHOLE = NOT_NUMBERS | st.integers(max_value=-1) | st.floats()
NOT_POSITIVE = NOT_NUMBERS | st.floats(max_value=0) | st.just(10**400) | st.just(0)
NOT_FLAGS = st.sampled_from([None, 0, 1, "true", []])
WRONG = {
    **dict.fromkeys(COUNTS + WHOLES, NOT_WHOLE),
    **dict.fromkeys(NUMBERS, NOT_POSITIVE),
    **dict.fromkeys(FLAGS, NOT_FLAGS),
}


def test_every_field_has_a_kind():
    others = {"q_lora_rank", "scoring_func", "rope_scaling"}
    assert set(WRONG) | others == set(KINDS)
    assert set(WHOLES) == {
        "n_shared_experts",
        "first_k_dense_replace",
        "num_nextn_predict_layers",
    }
    assert len(COUNTS) == 15 and len(NUMBERS) == 4 and len(FLAGS) == 2
    assert get_args(KINDS["rope_theta"]) == (float, Range(1, above=True))


@pytest.mark.slow
@given(
    st.sampled_from(sorted(WRONG)).flatmap(
        lambda name: st.tuples(st.just(name), WRONG[name])
    )
)
@settings(max_examples=200, deadline=None)
def test_a_field_of_a_wrong_type_or_size_is_named(change):
    name, value = change
    with pytest.raises(ValueError, match=name):
        small(**{name: value})
    with pytest.raises(ValueError, match=name):
        V3Config.from_hf(small().to_hf() | {name: value})


@pytest.mark.parametrize("name", [*COUNTS, "q_lora_rank"])
def test_a_size_of_zero_is_named(name):
    with pytest.raises(ValueError, match=f"{name}=0 cannot work: .*at least 1"):
        small(**{name: 0})


@pytest.mark.parametrize("name", [*COUNTS, "q_lora_rank", "n_shared_experts"])
def test_a_size_beyond_all_reason_is_named_before_anything_is_built(name):
    with pytest.raises(ValueError, match=f"{name}=.* cannot work: .* at most [0-9,]+"):
        V3Config.from_hf({**small().to_hf(), name: 10**15})


BAD_YARN: list[dict[str, Any]] = [
    {"factor": 0.5},
    {"factor": "4"},
    {"factor": float("nan")},
    {"factor": 10**400},
    {"beta_fast": 1, "beta_slow": 32},
    {"mscale": -1},
    {"original_max_position_embeddings": 0},
    {"original_max_position_embeddings": None},
    {"truncate": False},
    {"mscale_all_dim": True},
    # of other kinds of scaling
    {"low_freq_factor": 1.0},
    {"long_factor": [1.0, 2.0]},
    {"llama_4_scaling_beta": 0.1},
]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("num_experts_per_tok", {"num_experts_per_tok": 5}),
        ("num_experts_per_tok", {"topk_group": 1}),
        ("qk_rope_head_dim", {"qk_rope_head_dim": 5}),
        ("n_group", {"n_group": 3}),
        ("n_group", {"n_group": 8}),
        ("topk_group", {"topk_group": 5}),
        ("scoring_func", {"scoring_func": "tanh"}),
        ("scoring_func", {"scoring_func": None}),
        ("scoring_func", {"scoring_func": ["sigmoid"]}),
        ("q_lora_rank", {"q_lora_rank": "no"}),
        ("q_lora_rank", {"q_lora_rank": 1.5}),
        ("rope_theta", {"rope_theta": 1.0}),
        ("rope_scaling", {"rope_scaling": "yarn"}),
        ("rope_scaling", {"rope_scaling": {"type": "yarn"}}),
        ("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 2}}),
        ("rope_scaling", {"rope_scaling": {"rope_type": "llama3"}}),
        ("rope_scaling", {"rope_scaling": {}}),
        *(("rope_scaling", {"rope_scaling": YARN | change}) for change in BAD_YARN),
    ],
)
def test_a_config_whose_parts_do_not_fit_names_the_field(name, changes):
    with pytest.raises(ValueError, match=name):
        small(**changes)
    with pytest.raises(ValueError, match=name):
        V3Config.from_hf(small().to_hf() | changes)


# --- the config.json of Hugging Face


@pytest.mark.parametrize(
    "name, value",
    [
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("tie_word_embeddings", True),
        ("topk_method", "greedy"),
        ("model_type", "llama"),
        ("attention_dropout", 0.1),
        ("rope_interleave", False),
        ("mlp_bias", True),
        ("rope_parameters", "yarn"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 4),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("model_type", ["deepseek_v3"]),
    ],
)
def test_a_feature_that_is_not_computed_names_its_field(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* cannot work"):
        V3Config.from_hf(small().to_hf() | {name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        *V32_INDEXER.items(),
        ("qk_layernorm", True),
        ("hc_mult", 4),
        ("draft_vocab_size", 32000),
        ("final_logit_softcapping", 30.0),
        ("use_mtp_layernorm", False),
        ("text_config", {"model_type": "kimi_k2"}),
        ("hidden_sizes", None),
    ],
)
def test_a_field_that_nobody_has_thought_of_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.*may change what is computed"):
        V3Config.from_hf(V3_CONFIG | {name: value})


def test_a_field_whose_name_is_no_text_is_refused():
    with pytest.raises(ValueError, match="^7=8 cannot work"):
        V3Config.from_hf({7: 8})


@pytest.mark.parametrize("content", [None, [], "config", 3, [("vocab_size", 3)]])
def test_a_config_that_is_no_object_is_an_error(content):
    with pytest.raises(ValueError, match="JSON object"):
        V3Config.from_hf(content)


def test_the_published_config_is_the_default_but_for_the_initial_std():
    published = V3Config.from_hf(V3_CONFIG)
    assert published.with_(initializer_range=0.006) == V3Config.deepseek_v3()
    std = fact("v3.train.init_std").value
    assert std == V3Config.deepseek_v3().initializer_range


@pytest.mark.parametrize("seed", SEEDS)
def test_to_hf_and_from_hf_go_round_also_through_transformers(seed):
    config = random_config(seed)
    assert V3Config.from_hf(config.to_hf()) == config
    written = DeepseekV3Config(**config.to_hf()).to_dict()
    assert "rope_parameters" in written and "rope_scaling" not in written
    back = V3Config.from_hf(written)
    unread = {
        "rope_scaling": config.rope_scaling,
        "norm_topk_prob": config.norm_topk_prob,
    }
    assert back.with_(**unread) == config
    pairs = zip(rope_frequencies(config), rope_frequencies(back), strict=True)
    for mine, other in pairs:
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))


def test_names_of_transformers_5_are_read():
    written = small(rope_scaling=YARN).to_hf()
    for name in (
        "num_nextn_predict_layers",
        "n_routed_experts",
        "rope_scaling",
        "rope_theta",
    ):
        del written[name]
    written |= {
        "num_mtp_layers": 2,
        "num_local_experts": 8,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN},
    }
    config = V3Config.from_hf(written)
    assert config.num_nextn_predict_layers == 2
    assert config.n_routed_experts == 8
    assert config.rope_theta == 500.0
    frequencies = rope_frequencies(small(rope_scaling=YARN, rope_theta=500.0))[0]
    assert torch.equal(rope_frequencies(config)[0], frequencies)


@pytest.mark.parametrize(
    "plain",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": None},
    ],
)
def test_plain_rope_has_many_names(plain):
    assert V3Config.from_hf(small().to_hf() | plain) == small()


def test_a_theta_beside_the_scaling_is_read():
    scaling = {"rope_theta": 500.0, **YARN}
    config = V3Config.from_hf(small().to_hf() | {"rope_scaling": scaling})
    assert config == small(rope_theta=500.0, rope_scaling=YARN)
    assert scaling["rope_theta"] == 500.0  # what was given stays


@pytest.mark.parametrize(
    "name, more",
    [
        ("num_nextn_predict_layers|num_mtp_layers", {"num_mtp_layers": 2}),
        ("n_routed_experts|num_local_experts", {"num_local_experts": 16}),
        ("rope_parameters", {"rope_scaling": YARN, "rope_parameters": YARN}),
    ],
)
def test_two_names_for_one_thing_that_disagree_are_refused(name, more):
    with pytest.raises(ValueError, match=f"^({name})="):
        V3Config.from_hf(small().to_hf() | more)
    with pytest.raises(ValueError, match=f"^({name})="):
        V3Config.from_hf(more | small().to_hf() | more)
    same = {"num_mtp_layers": 1, "num_local_experts": 8}
    assert V3Config.from_hf(small().to_hf() | same) == small()


@pytest.mark.parametrize("depths, experts", [(1, 256), (0, 64)])
def test_what_transformers_writes_of_itself_loads(depths, experts):
    theirs = DeepseekV3Config(num_nextn_predict_layers=depths, n_routed_experts=experts)
    config = V3Config.from_hf(theirs.to_dict())
    assert config.num_nextn_predict_layers == depths
    assert config.n_routed_experts == experts
    # transformers' own defaults differ from the published file in these
    changed = {"max_position_embeddings": 163840, "initializer_range": 0.006}
    expected = V3Config(num_nextn_predict_layers=depths, n_routed_experts=experts)
    assert config.with_(**changed) == expected


def test_fields_that_change_nothing_are_passed_over():
    more = TRANSFORMERS_4 | {
        "use_cache": True,
        "ep_size": 1,
        "auto_map": {},
        "quantization_config": {},
        "_commit_hash": "0" * 40,
        "num_key_value_heads": 2,
        "head_dim": 999,
        "dtype": "bfloat16",
    }
    assert V3Config.from_hf(small().to_hf() | more) == small()


# --- the files of DeepSeek's inference code


@pytest.mark.slow
@pytest.mark.parametrize("native", [NATIVE_671B, NATIVE_V31])
def test_the_native_671b_file_is_the_671b_model(native):
    config = V3Config.from_hf(native)
    # that code has no MTP; all else is the same, YaRN and the softmax scale too
    expected = V3Config.deepseek_v3().with_(num_nextn_predict_layers=0)
    assert config == expected
    frequencies, turn_scale, softmax_scale = rope_frequencies(config)
    assert torch.equal(frequencies, rope_frequencies(V3Config.deepseek_v3())[0])
    assert turn_scale == 1.0
    assert softmax_scale == pytest.approx(0.1352, abs=5e-5)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352


def test_in_the_native_16b_file_zero_means_no_latent():
    config = V3Config.from_hf(NATIVE_16B)
    assert config.q_lora_rank is None
    assert (config.scoring_func, config.norm_topk_prob) == ("softmax", False)
    assert (config.n_group, config.topk_group) == (1, 1)
    _, turn_scale, softmax_scale = rope_frequencies(config)
    assert turn_scale == 1.0
    # 192^-0.5 * (0.1 * 0.707 * ln(40) + 1)^2
    assert softmax_scale == pytest.approx(0.11472, abs=5e-6)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    # DeepSeek-V2-Lite, published as 15.7B
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(15.7e9, rel=0.001)


def test_the_native_236b_file_is_refused_for_how_it_scores_groups():
    with pytest.raises(ValueError, match="n_limited_groups=3 .*best expert"):
        V3Config.from_hf(NATIVE_236B)
    # without a choice of groups it does not matter how they are scored
    config = V3Config.from_hf(NATIVE_236B | {"n_limited_groups": 8})
    assert (config.n_group, config.topk_group) == (8, 8)


def test_short_native_models_have_no_yarn():
    config = V3Config.from_hf(NATIVE_671B | {"max_seq_len": 4096})
    assert config.rope_scaling is None
    assert config.max_position_embeddings == 4096
    assert rope_frequencies(config)[2] == pytest.approx(192**-0.5)
    longer = V3Config.from_hf(NATIVE_671B | {"max_seq_len": 200_000})
    assert longer.max_position_embeddings == 200_000


def test_silent_native_fields_have_that_codes_defaults():
    assert V3Config.from_hf({"n_layers": 27, "mscale": 0.707}) == V3Config.from_hf(
        NATIVE_16B
    )


@pytest.mark.parametrize(
    "name, value",
    [
        *V32_INDEXER.items(),
        ("hidden_size", 7168),
        ("norm_eps", 1e-6),
        ("model_type", "deepseek_v32"),
        ("dim", "7168"),
        ("n_layers", 0),
        ("score_func", "sqrtsoftplus"),
        ("max_seq_len", "long"),
        ("max_seq_len", None),
        ("rope_factor", 0.5),
        ("rope_factor", float("nan")),
        ("mscale", 0),
        ("beta_slow", 0),
    ],
)
def test_a_native_field_that_is_not_computed_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* cannot work"):
        V3Config.from_hf(NATIVE_671B | {name: value})


# --- other models of this architecture, and of others


def numbers(config: V3Config) -> int:
    with torch.device("meta"):
        model = DeepSeekV3(config)
    return sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.slow
def test_kimi_k2_loads_with_its_published_number_of_parameters():
    config = V3Config.from_hf(KIMI_K2)
    assert (config.n_routed_experts, config.n_group) == (384, 1)
    assert config.num_nextn_predict_layers == 0
    assert numbers(config) == pytest.approx(1026.408e9, abs=0.0005e9)
    # 192^-0.5 * (0.1 * ln(32) + 1)^2
    assert rope_frequencies(config)[2] == pytest.approx(0.13086, abs=5e-6)


def test_moonlight_loads():
    config = V3Config.from_hf(MOONLIGHT)
    assert config.q_lora_rank is None and config.rope_scaling is None
    assert numbers(config) == pytest.approx(15.96e9, abs=0.005e9)


def test_a_model_with_more_dense_layers_than_layers_is_all_dense():
    config = V3Config.from_hf(TINY_ALL_DENSE)
    assert config.first_k_dense_replace == 3
    with torch.device("meta"):
        model = DeepSeekV3(config)
    assert len(model.layers) == 2 and not model.routers()
    assert V3Config.from_hf(config.to_hf()) == config
    trained = DeepSeekV3(small(first_k_dense_replace=9, num_nextn_predict_layers=0))
    assert not trained.routers()
    assert trained(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


def test_later_and_earlier_models_are_refused_for_what_they_are():
    with pytest.raises(ValueError, match="^model_type='deepseek_v2'"):
        V3Config.from_hf(V3_CONFIG | V2_ROUTING)
    edited = V2_ROUTING | {"model_type": "deepseek_v3"}
    with pytest.raises(ValueError, match="^topk_method='group_limited_greedy'"):
        V3Config.from_hf(V3_CONFIG | edited)
    with pytest.raises(ValueError, match="^model_type='deepseek_v32'"):
        V3Config.from_hf(V3_CONFIG | V32_INDEXER | {"model_type": "deepseek_v32"})
    with pytest.raises(ValueError, match="^index_head_dim=128"):
        V3Config.from_hf(V3_CONFIG | V32_INDEXER)
