"""The arms of the attention comparison differ in what they should."""

from dataclasses import replace

from helpers.checks import InputError
from helpers.tests.training.small_runs import SETTINGS
from helpers.training.attention_arms import Arm, build, train
from helpers.training.runs import code_hash
from helpers.v3 import MLA, V3Config
from helpers.v3.gqa import GQA

import pytest
import torch

CONFIG = V3Config.tiny(
    vocab_size=300,
    num_hidden_layers=2,
    first_k_dense_replace=2,
    q_lora_rank=None,
    num_nextn_predict_layers=0,
)
MHA = Arm("MHA", groups=4)
ARMS = [MHA, Arm("GQA", groups=2), Arm("MQA", 1, 4, 32, 32), Arm("MLA")]
each_arm = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@each_arm
def test_all_have_the_same_number_of_parameters_and_shared_first_weights(arm):
    model = build(arm, CONFIG, seed=3)
    base = build(Arm("MLA"), CONFIG, seed=3)
    step = 3 * CONFIG.hidden_size  # a feed-forward one wider has so many more
    apart = abs(parameters(model) - parameters(base))
    assert apart <= CONFIG.num_hidden_layers * step / 2
    shared = dict(base.named_parameters())
    same = []
    for name, parameter in model.named_parameters():
        if name in shared and shared[name].shape == parameter.shape:
            assert torch.equal(parameter, shared[name]), name
            same.append(name)
    assert {"embed_tokens.weight", "lm_head.weight"} <= set(same)
    assert "layers.1.self_attn.o_proj.weight" in same
    kinds = {type(block.self_attn) for block in model.layers}
    assert kinds == {MLA if arm.name == "MLA" else GQA}


def test_feed_forwards_of_equal_width_on_request():
    wide = build(replace(MHA, equal_parameters=False), CONFIG, seed=0)
    assert wide.config.intermediate_size == CONFIG.intermediate_size
    assert parameters(wide) > parameters(build(MHA, CONFIG, seed=0))


def test_one_position_key_is_shared_by_all_heads():
    arm = replace(MHA, one_position_key=True)
    assert arm.cached(CONFIG) == 4 * (32 + 32) + 16
    layer = build(arm, CONFIG, seed=0).layers[0].self_attn
    keys = layer._keys(torch.randn(2, 3, CONFIG.hidden_size))
    assert keys.shape == (2, 3, 4, 48)
    content, position = keys.split((32, 16), dim=-1)
    assert (position == position[:, :, :1]).all()
    assert not torch.equal(content[:, :, 0], content[:, :, 1])


def test_the_norm_of_the_latent_can_be_left_out():
    with_norm = build(Arm("MLA"), CONFIG, seed=0)
    without = build(Arm("MLA", latent_norm=False), CONFIG, seed=0)
    norms = CONFIG.num_hidden_layers * CONFIG.kv_lora_rank
    assert parameters(with_norm) - parameters(without) == norms
    ids = torch.arange(6).unsqueeze(0)
    assert not torch.equal(with_norm(ids), without(ids))


@each_arm
def test_new_weights_are_drawn_as_all_others(arm):
    model = build(arm, CONFIG, seed=0)
    for parameter in model.layers[0].self_attn.parameters():
        if parameter.dim() > 1:
            spread = parameter.std().item()
            assert spread == pytest.approx(CONFIG.initializer_range, rel=0.1)


def test_what_each_keeps_per_token():
    kept = {arm.name: arm.cached(CONFIG) for arm in ARMS}
    assert kept == {"MHA": 320, "GQA": 160, "MQA": 64, "MLA": 64}


def test_seeds_differ_and_one_seed_is_one_model():
    first, again, other = (build(MHA, CONFIG, seed) for seed in (0, 0, 1))
    weight = first.layers[1].self_attn.o_proj.weight
    assert torch.equal(weight, again.layers[1].self_attn.o_proj.weight)
    assert not torch.equal(weight, other.layers[1].self_attn.o_proj.weight)


def test_a_change_that_an_arm_cannot_have_is_refused():
    with pytest.raises(InputError, match="one_position_key"):
        Arm("MLA", one_position_key=True)
    with pytest.raises(InputError, match="latent_norm"):
        Arm("MHA", groups=4, latent_norm=False)


def test_a_model_with_experts_is_refused():
    with pytest.raises(InputError, match="first_k_dense_replace"):
        build(MHA, CONFIG.with_(first_k_dense_replace=1), seed=0)


@pytest.mark.slow
def test_a_finished_run_is_found_again_and_arms_do_not_share_one(corpus):
    settings = replace(SETTINGS, steps=4)
    model, history = train(MHA, CONFIG, corpus, settings)
    again, found = train(MHA, CONFIG, corpus, settings)
    assert found == history
    # a change of this module makes the run a stale one
    assert history["provenance"]["code"] == code_hash(train.__module__)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    _, other = train(ARMS[1], CONFIG, corpus, settings)
    assert other["valid_loss"] != history["valid_loss"]
