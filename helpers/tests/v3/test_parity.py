"""The whole model beside transformers: logits, gradients, files."""

import warnings

from helpers.tests.builders import MSCALES, draw, ids, random_config, small, theirs_of
from helpers.v3 import LatentCache, checkpoint

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

SEEDS = range(24)

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")


# --- against transformers


def test_the_random_configs_hold_every_choice():
    configs = [random_config(seed) for seed in SEEDS]
    seen = {(c.q_lora_rank is None, c.rope_scaling is None) for c in configs}
    assert (
        len(seen) == 4
        and {c.n_group for c in configs} == {1, 2, 4}
        and {c.n_shared_experts for c in configs} == {1, 2}
    )
    assert {c.first_k_dense_replace for c in configs} == {0, 1, 2}
    assert {c.moe_intermediate_size % 4 == 0 for c in configs} == {True, False}
    assert {
        c.v_head_dim > c.qk_nope_head_dim + c.qk_rope_head_dim for c in configs
    } == {True, False}
    assert len({str(c.rope_scaling) for c in configs}) == 1 + len(MSCALES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_logits_equal_transformers_in_prefill_and_step_by_step(
    seed, tmp_path, ignore_mtp_layers
):
    config = random_config(seed)
    ignore_mtp_layers(config)
    model = draw(config, seed)
    theirs = theirs_of(model, tmp_path)
    tokens = ids(config, 2, 23)
    whole = theirs(tokens).logits
    assert whole.std() > 0.1
    assert (model(tokens) - whole).abs().max() < 1e-4
    cache, past, steps = (
        LatentCache(config, config.num_hidden_layers, 2, 23, whole),
        None,
        [],
    )
    for i in range(23):
        out = theirs(tokens[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(model(tokens[:, i : i + 1], cache))
        assert (steps[-1] - out.logits).abs().max() < 1e-4
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-4


def tensors_in(folder):
    """All tensors of a folder of safetensors files by their published names."""
    return {
        name: tensor
        for file in folder.glob("model*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_gradients_equal_transformers_under_the_published_names(tmp_path):
    config = random_config(2).with_(num_nextn_predict_layers=0)
    model = draw(config)
    theirs = theirs_of(model, tmp_path / "weights")
    tokens = ids(config, 2, 17)
    for logits in (model(tokens), theirs(tokens).logits):
        F.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
    for m in (model, theirs):
        for p in m.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
    checkpoint.save(model, tmp_path / "gradients")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (
        tensors_in(tmp_path / "gradients" / "latest"),
        tensors_in(tmp_path / "theirs"),
    )
    assert set(a) == set(b) and len(a) > 40
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5, rtol=1e-3), name
    assert sum(t.abs().max() > 1e-3 for t in a.values()) > 40


def test_loading_into_transformers_warns_of_nothing(
    tmp_path, ignore_mtp_layers, caplog
):
    ignore_mtp_layers(small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs_of(draw(small()), tmp_path)
    assert not caplog.records
