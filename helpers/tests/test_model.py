import math
import random
import warnings
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from helpers import checkpoint, facts, train
from helpers import model as ours
from helpers.model import DeepSeekV3, LatentCache, MoE, Router, V3Config

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
MSCALES = ({}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"mscale_all_dim": 0.8}, {"mscale": 0.8},
           {"beta_fast": 4, "beta_slow": 2, "attention_factor": 0.9})
SEEDS = range(24)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run many times as fast on one thread when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def small(**changes):
    """A config in which every part is present and no two sizes are equal."""
    sizes = dict(
        vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=3, num_attention_heads=3,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=14,
        kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=64, initializer_range=0.2,
    )
    return V3Config(**(sizes | changes))


def random_config(seed):
    """The listed choices go round with the seed, so that SEEDS holds each of them; the sizes are drawn."""
    rng = random.Random(seed)
    groups, per_group = (1, 2, 4)[seed % 3], rng.randint(2, 5)
    topk_group = rng.randint(1, groups)
    return V3Config(
        vocab_size=rng.randint(30, 90), hidden_size=rng.randint(16, 40), intermediate_size=rng.randint(16, 50),
        moe_intermediate_size=rng.choice([8, 12, 7, 13, 18]), num_hidden_layers=rng.randint(2, 3), num_attention_heads=rng.randint(1, 4),
        n_routed_experts=groups * per_group, n_group=groups, topk_group=topk_group, n_shared_experts=1 + seed // 4 % 2,
        num_experts_per_tok=rng.randint(1, min(4, topk_group * per_group)), first_k_dense_replace=seed // 3 % 3,
        norm_topk_prob=seed % 5 != 0, routed_scaling_factor=rng.uniform(0.5, 2.5), q_lora_rank=None if seed % 2 else rng.randint(5, 20),
        kv_lora_rank=rng.randint(5, 20), qk_rope_head_dim=2 * rng.randint(1, 6), qk_nope_head_dim=rng.randint(3, 12),
        v_head_dim=rng.randint(3, 30), num_nextn_predict_layers=seed % 3 % 2, max_position_embeddings=64,
        initializer_range=rng.uniform(0.1, 0.3), rms_norm_eps=rng.choice([1e-6, 1e-5]), rope_theta=rng.choice([50.0, 10000.0]),
        rope_scaling=YARN | MSCALES[seed // 4 % len(MSCALES)] if seed // 2 % 2 else None,
    )


def draw(config, seed=0):
    """A model in eval mode whose selection biases and norms are random too."""
    torch.manual_seed(seed)
    model = DeepSeekV3(config).eval()
    with torch.no_grad():
        for router in model.routers():
            router.e_score_correction_bias.normal_(0, 0.3)
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    return model


def ids(config, batch, length, seed=1):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def theirs_of(model, folder):
    """transformers' model from the files that we save."""
    checkpoint.save(model, folder)
    return DeepseekV3ForCausalLM.from_pretrained(folder / "latest", attn_implementation="eager", experts_implementation="eager").eval()


@pytest.fixture
def ignore_mtp_layers(monkeypatch):
    """transformers' list of layers to pass over names layer 61 only; the MTP layers of a small model have another number."""
    def ignore(config):
        layers = [rf"model\.layers\.{config.num_hidden_layers}.*"]
        monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", layers)
    return ignore


# ------------------------------------------------------------------------------------------------------------- against transformers


def test_the_random_configs_hold_every_choice():
    configs = [random_config(seed) for seed in SEEDS]
    seen = {(c.q_lora_rank is None, c.rope_scaling is None) for c in configs}
    assert len(seen) == 4 and {c.n_group for c in configs} == {1, 2, 4} and {c.n_shared_experts for c in configs} == {1, 2}
    assert {c.first_k_dense_replace for c in configs} == {0, 1, 2}
    assert {c.moe_intermediate_size % 4 == 0 for c in configs} == {True, False}
    assert {c.v_head_dim > c.qk_nope_head_dim + c.qk_rope_head_dim for c in configs} == {True, False}
    assert len({str(c.rope_scaling) for c in configs}) == 1 + len(MSCALES)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_logits_equal_transformers_in_prefill_and_step_by_step(seed, tmp_path, ignore_mtp_layers):
    config = random_config(seed)
    ignore_mtp_layers(config)
    model = draw(config, seed)
    theirs = theirs_of(model, tmp_path)
    tokens = ids(config, 2, 23)
    whole = theirs(tokens).logits
    assert whole.std() > 0.1
    assert (model(tokens) - whole).abs().max() < 1e-4
    cache, past, steps = LatentCache(config, config.num_hidden_layers, 2, 23, whole), None, []
    for i in range(23):
        out = theirs(tokens[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(model(tokens[:, i : i + 1], cache))
        assert (steps[-1] - out.logits).abs().max() < 1e-4
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-4


def tensors_in(folder):
    """All tensors of a folder of safetensors files by their published names."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def test_gradients_equal_transformers_under_the_published_names(tmp_path):
    config = random_config(2).with_(num_nextn_predict_layers=0)
    model = draw(config)
    theirs = theirs_of(model, tmp_path / "weights")
    tokens = ids(config, 2, 17)
    for logits in (model(tokens), theirs(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for m in (model, theirs):
        for p in m.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
    checkpoint.save(model, tmp_path / "gradients")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = tensors_in(tmp_path / "gradients" / "latest"), tensors_in(tmp_path / "theirs")
    assert set(a) == set(b) and len(a) > 40
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5, rtol=1e-3), name
    assert sum(t.abs().max() > 1e-3 for t in a.values()) > 40


@pytest.mark.parametrize("changes", [*MSCALES, {"original_max_position_embeddings": 4}, {"beta_fast": 1, "beta_slow": 1},
                                     {"factor": 40, "original_max_position_embeddings": 4096},
                                     {"original_max_position_embeddings": 100000}])
@pytest.mark.parametrize("theta", [3.0, 10000])
def test_yarn_frequencies_equal_transformers(changes, theta):
    config = small(rope_scaling=YARN | changes, rope_theta=theta, qk_rope_head_dim=16)
    rotary = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config.to_hf()))
    freq, scale, _ = ours.rope_frequencies(config)
    assert torch.allclose(freq, rotary.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(rotary.attention_scaling)


BETAS = st.tuples(*(st.none() | st.floats(0.01, 200),) * 2).map(
    lambda pair: pair if (pair[0] or 32) >= (pair[1] or 1) else (pair[1] or 1, pair[0] or 32))


@given(st.integers(1, 64), st.floats(1.01, 1e7), st.one_of(st.integers(1, 100), st.floats(1, 1e4), st.just(None)), st.integers(1, 200_000), BETAS,
       st.fixed_dictionaries({}, optional={"mscale": st.floats(0, 2), "mscale_all_dim": st.floats(0, 2), "attention_factor": st.floats(0.1, 3)}))
@settings(max_examples=100, deadline=None)
def test_yarn_frequencies_equal_transformers_for_any_settings(pairs, theta, factor, original, betas, scales):
    yarn = {"type": "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": betas[0], "beta_slow": betas[1]} | scales
    config = small(qk_rope_head_dim=2 * pairs, rope_theta=theta, rope_scaling=yarn, max_position_embeddings=3 * original)
    freq, turn_scale, softmax_scale = ours.rope_frequencies(config)
    expected, expected_scale = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**config.to_hf()))
    torch.testing.assert_close(freq, expected, rtol=1e-5, atol=0)
    assert turn_scale == pytest.approx(expected_scale)
    plain = theta ** -(torch.arange(pairs) / pairs)
    stretched = plain / (factor or 3)
    assert (freq <= plain * 1.0001).all() and (freq >= stretched * 0.9999).all()  # each pair is kept, stretched or between
    sharper = 0.1 * scales.get("mscale_all_dim", 0) * math.log(factor or 3) + 1
    assert softmax_scale * (config.qk_nope_head_dim + 2 * pairs) ** 0.5 == pytest.approx(sharper**2)


def test_the_softmax_scale_of_the_671b_model_is_the_papers():
    assert ours.rope_frequencies(V3Config.deepseek_v3())[2] == pytest.approx(192**-0.5 * 1.3689**2, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- attention and its cache


@pytest.mark.parametrize("q_lora_rank", [None, 14])
@pytest.mark.parametrize("v_head_dim", [8, 19])
@torch.no_grad()
def test_naive_and_absorbed_attention_agree_on_the_same_latents(q_lora_rank, v_head_dim):
    config = small(q_lora_rank=q_lora_rank, v_head_dim=v_head_dim, rope_scaling=YARN)
    model = draw(config)
    attention = model.layers[0].self_attn
    q_nope, q_rope, latent = attention.project(torch.randn(2, 9, 24), model.rope(0, 9))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    whole = attention.naive(q_nope, q_rope, latent)
    assert whole.shape == (2, 9, 3, v_head_dim)
    assert torch.allclose(attention.absorbed(q_nope, q_rope, latent, causal), whole, atol=1e-5)
    last = attention.absorbed(q_nope[:, -1:], q_rope[:, -1:], latent)
    assert torch.allclose(last, whole[:, -1:], atol=1e-5)
    tail = attention.naive(q_nope[:, 4:], q_rope[:, 4:], latent, causal[4:])
    assert torch.allclose(tail, whole[:, 4:], atol=1e-5)


@torch.no_grad()
def test_the_cache_holds_latent_and_shared_key_and_nothing_else():
    config = small()
    model, cache = draw(config), LatentCache(config, 3, 2, 12, torch.zeros(1))
    assert cache.nbytes == 0
    model(ids(config, 2, 7), cache)
    per_token = 3 * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert (cache.length, cache.nbytes) == (7, 7 * 2 * per_token * 4)
    assert all(rows[:, :7].abs().sum(dim=-1).min() > 0 and rows[:, 7:].abs().sum() == 0 for rows in cache.rows)
    assert LatentCache(config, 3, 1, 12, torch.zeros(1, dtype=torch.bfloat16)).rows[0].dtype == torch.bfloat16


@pytest.mark.parametrize("chunks", [(1, 22), (10, 3, 10), (22, 1), (5, 1, 1, 16), (23,)])
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
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6) and not torch.allclose(before[:, 8], after[:, 8], atol=1e-3)


# --------------------------------------------------------------------------------------------------------- multi-token prediction


@torch.no_grad()
def test_mtp_depths_have_the_papers_shapes():
    config = small(num_nextn_predict_layers=2)
    model, tokens = draw(config), ids(config, 2, 11)
    assert [tuple(logits.shape) for logits in model.predict_further(model.hidden(tokens), tokens)] == [(2, 10, 61), (2, 9, 61)]
    assert draw(small(num_nextn_predict_layers=0)).predict_further(torch.zeros(2, 11, 24), tokens) == []


@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_mtp_sees_the_tokens_up_to_i_plus_k_and_not_its_target(k):
    config, i = small(num_nextn_predict_layers=2), 5
    model, tokens = draw(config), ids(config, 1, 14)

    def at(text):
        return model.predict_further(model.hidden(text), text)[k - 1][0, i]

    before = at(tokens)
    for place in range(i + k + 1, 14):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % config.vocab_size
        assert torch.allclose(at(changed), before, atol=1e-6), place
    changed = tokens.clone()
    changed[0, i + k] = (changed[0, i + k] + 1) % config.vocab_size
    assert not torch.allclose(at(changed), before, atol=1e-3)


def toy_text(batch, length, generator):
    """Rows made of four phrases in random order: partly to be foreseen, partly not."""
    phrases = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 3, 12, 13, 14], [15, 16, 2, 17, 18]])
    return phrases[torch.randint(4, (batch, length // 5 + 1), generator=generator)].flatten(1)[:, :length]


@pytest.fixture(scope="module")
def toy_model():
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    config = small(vocab_size=20, hidden_size=32, num_hidden_layers=2, kv_lora_rank=16, qk_nope_head_dim=8, initializer_range=0.08,
                   moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    model = DeepSeekV3(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        main, mtp, _ = train.losses(model, toy_text(8, 41, generator))
        optimizer.zero_grad()
        (main + 0.3 * mtp).backward()
        optimizer.step()
    return model.eval()


def test_drafting_writes_and_accepts_what_transformers_does(toy_model, tmp_path, ignore_mtp_layers):
    ignore_mtp_layers(toy_model.config)
    theirs = theirs_of(toy_model, tmp_path)
    counts = [0, 0]
    for seed in range(4):
        prompt = toy_text(1, 7 + seed, torch.Generator().manual_seed(seed))
        text, counted = toy_model.generate_with_mtp(prompt, 40, eos_token_id=0)
        assert torch.equal(text, toy_model.generate(prompt, 40, eos_token_id=0))
        forwards = []
        hook = theirs.model.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        other = theirs.generate(prompt, max_new_tokens=40, use_mtp=True, do_sample=False, eos_token_id=0, pad_token_id=0)
        hook.remove()
        assert torch.equal(text, other)
        assert counted.forwards == len(forwards)
        assert counted.forwards == counted.drafted + 1 and text.shape[1] - prompt.shape[1] == counted.forwards + counted.accepted
        counts = [counts[0] + counted.accepted, counts[1] + counted.drafted]
    assert 0 < counts[0] < counts[1]


def test_swapped_halves_of_eh_proj_lose_accepted_drafts_but_not_the_text(toy_model, monkeypatch):
    prompt = toy_text(1, 8, torch.Generator().manual_seed(0))
    text, counted = toy_model.generate_with_mtp(prompt, 40)
    weight = toy_model.mtp[0].eh_proj.weight
    monkeypatch.setattr(weight, "data", weight.data.roll(weight.shape[1] // 2, dims=1))
    other, swapped = toy_model.generate_with_mtp(prompt, 40)
    assert torch.equal(text, other) and swapped.accepted < counted.accepted and swapped.forwards > counted.forwards


def test_drafting_stops_at_the_first_eos_and_at_the_asked_length(toy_model):
    prompt = toy_text(1, 8, torch.Generator().manual_seed(1))
    whole = toy_model.generate(prompt, 30)
    for length in range(6):
        assert torch.equal(toy_model.generate_with_mtp(prompt, length)[0], whole[:, : 8 + length])
    for eos in whole[0, 8:].unique().tolist():
        text, _ = toy_model.generate_with_mtp(prompt, 30, eos_token_id=eos)
        assert torch.equal(text, toy_model.generate(prompt, 30, eos_token_id=eos))
        assert text[0, -1] == eos and eos not in text[0, 8:-1]


# --------------------------------------------------------------------------------------------------------------------- generation


def test_greedy_rows_of_a_batch_are_those_written_alone_and_by_the_full_forward():
    config = small()
    model, prompts = draw(config), ids(config, 5, 6)
    together = model.generate(prompts, 12)
    assert torch.equal(together, torch.cat([model.generate(row[None], 12) for row in prompts]))
    text = prompts
    for _ in range(12):
        text = torch.cat((text, model(text)[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(together, text)


def test_rows_that_wrote_eos_leave_the_batch_and_are_filled_with_it(monkeypatch):
    config = small(vocab_size=7)
    model, prompts = draw(config), ids(config, 8, 4)
    free = model.generate(prompts, 20)
    eos = 3
    expected = free.clone()
    for row in expected:
        if len(found := (row[4:] == eos).nonzero()):
            row[4 + found[0, 0] :] = eos
    done = (expected[:, 4:] == eos).any(dim=1)
    sizes = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, cache=None: sizes.append(len(x)) or hidden(x, cache))
    out = model.generate(prompts, 20, eos_token_id=eos)
    assert 0 < done.sum() and torch.equal(out, expected[:, : out.shape[1]])
    assert out.shape[1] == 24 or done.all()
    assert sizes[0] == 8 and sizes[-1] < 8 and sizes == sorted(sizes, reverse=True)


def test_stream_gets_each_new_token_in_turn():
    config = small()
    model, got = draw(config), []
    out = model.generate(ids(config, 1, 5), 9, stream=got.append)
    assert got == out[0, 5:].tolist() and all(type(token) is int for token in got)


def test_sampled_text_repeats_with_the_generator_and_differs_without():
    config = small()
    model, prompts = draw(config), ids(config, 3, 5)

    def write(seed):
        return model.generate(prompts, 10, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(write(5), write(5)) and not torch.equal(write(5), write(6))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_draws_from_the_softmax(temperature):
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 1.0])
    drawn = ours.sample(logits.expand(40000, 5), temperature, torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=5) / 40000
    assert torch.allclose(share, torch.softmax(logits / temperature, dim=0), atol=0.01) and share[3] == 0
    assert torch.equal(ours.sample(logits[None], 0.0), torch.tensor([0]))


@pytest.mark.parametrize("tokens, more, message", [
    (torch.zeros(1, 60, dtype=torch.long), {}, "max_position_embeddings=64"),
    (torch.zeros(1, 65, dtype=torch.long), {"max_new_tokens": 0}, "max_position_embeddings=64"),
    (torch.tensor([[1, 61]]), {}, "input_ids.*vocab_size=61"),
    (torch.tensor([[1, -1]]), {}, "input_ids.*0..60"),
    (torch.zeros(3, dtype=torch.long), {}, "input_ids"),
    (torch.zeros(1, dtype=torch.long), {"max_new_tokens": 0}, "input_ids"),
    (torch.zeros(1, 0, dtype=torch.long), {}, "input_ids"),
    (torch.zeros(1, 1, 3, dtype=torch.long), {}, "input_ids"),
    (torch.zeros(1, 3), {}, "input_ids"),
    (torch.zeros(1, 3, dtype=torch.long), {"max_new_tokens": -1}, "max_new_tokens=-1"),
    (torch.zeros(1, 3, dtype=torch.long), {"temperature": -0.1}, "temperature=-0.1"),
    (torch.zeros(1, 3, dtype=torch.long), {"temperature": float("nan")}, "temperature=nan"),
    (torch.zeros(2, 3, dtype=torch.long), {"stream": print}, "stream.*one row.*2"),
])
def test_generate_says_what_is_wrong_with_its_input(tokens, more, message):
    model = draw(small())
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, **({"max_new_tokens": 5} | more))
    if "temperature" not in more and "stream" not in more:
        with pytest.raises(ValueError, match=message):
            model.generate_with_mtp(tokens, **({"max_new_tokens": 5} | more))


def test_drafting_needs_one_row_and_an_mtp_module():
    one = torch.zeros(1, 3, dtype=torch.long)
    for model, tokens in ((draw(small()), one.expand(2, 3)), (draw(small(num_nextn_predict_layers=0)), one)):
        with pytest.raises(ValueError, match="one row.*num_nextn_predict_layers"):
            model.generate_with_mtp(tokens, 5)


@torch.no_grad()
def test_the_context_may_be_filled_to_its_end():
    config = small(max_position_embeddings=16)
    model = draw(config)
    assert model.generate(ids(config, 1, 10), 6).shape == (1, 16) and model.generate_with_mtp(ids(config, 1, 10), 6)[0].shape == (1, 16)
    with pytest.raises(ValueError, match="17 tokens.*max_position_embeddings=16"):
        model(ids(config, 1, 17))


# ------------------------------------------------------------------------------------------------------------- router and experts


@torch.no_grad()
def test_the_bias_selects_but_has_no_part_in_the_weights():
    config = small(n_group=1, topk_group=1, routed_scaling_factor=2.0)
    router = draw(config).routers()[0].eval()
    x = torch.randn(1, 20, 24)
    scores = (x[0] @ router.weight.T).sigmoid()
    router.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]))
    weights, index = router(x)
    assert torch.equal(index.sort(dim=-1).values, torch.arange(3).expand(20, 3))
    right = scores.gather(1, index)
    assert torch.allclose(weights, 2.0 * right / right.sum(dim=-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@torch.no_grad()
def test_only_the_best_groups_are_chosen_from(scoring_func):
    config = small(n_routed_experts=12, scoring_func=scoring_func)
    router = draw(config).routers()[0].eval()
    x = torch.randn(1, 50, 24)
    logits = x[0] @ router.weight.T
    scores = (logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)) + router.e_score_correction_bias
    limited = 0
    for row, chosen in zip(scores.tolist(), router(x)[1].tolist(), strict=True):
        groups = [sorted(row[g * 3 : g * 3 + 3])[-2:] for g in range(4)]
        best = sorted(range(4), key=lambda g: sum(groups[g]))[-2:]
        allowed = [e for e in range(12) if e // 3 in best]
        assert set(chosen) == set(sorted(allowed, key=row.__getitem__)[-3:])
        limited += set(chosen) != set(sorted(range(12), key=row.__getitem__)[-3:])
    assert limited > 0


def test_update_bias_moves_by_the_sign_of_the_load_error_and_counts_anew():
    router = Router(small(n_routed_experts=4, n_group=1, topk_group=1))
    router.load.copy_(torch.tensor([10.0, 0, 5, 5]))
    router.update_bias(0.01)
    assert torch.allclose(router.e_score_correction_bias, torch.tensor([-0.01, 0.01, 0, 0])) and router.load.sum() == 0


def test_load_counts_each_choice_in_training_and_none_in_eval():
    router = draw(small()).routers()[0]
    x = torch.randn(2, 5, 24)
    router.eval()(x)
    assert router.load.sum() == 0
    counts = router.train()(x)[1].flatten().bincount(minlength=8)
    router(x)
    assert torch.equal(router.load, 2.0 * counts)


@pytest.mark.parametrize("seq_aux, expected", [(True, (1.5 + 1.0) / 2), (False, 1.5 * 0.625 + 0.5 * 0.375)])
def test_balance_loss_by_hand(seq_aux, expected):
    """Two experts, one chosen, affinities 3/4 and 1/4. First sequence: f = (2, 0), P = (3/4, 1/4); second: f = (1, 1), P = (1/2, 1/2)."""
    router = Router(small(hidden_size=1, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, seq_aux=seq_aux)).train()
    router.weight.data = torch.tensor([[1.0], [-1.0]])
    router(math.log(3) * torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]]))
    assert router.balance_loss.item() == pytest.approx(expected)


def plain_experts(moe, x):
    """The mixture token by token and expert by expert."""
    gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
    rows = x.flatten(0, -2)
    weights, index = moe.gate(x)
    out = []
    for n, row in enumerate(rows):
        y = moe.shared_experts(row)
        for w, e in zip(weights[n], index[n].tolist(), strict=True):
            gate, up = (gate_up[e] @ row).chunk(2)
            y = y + w * (down[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("hidden_size, moe_intermediate_size", [(24, 12), (24, 7), (21, 12), (21, 7)])
def test_moe_output_and_gradients_equal_the_double_loop(hidden_size, moe_intermediate_size):
    config = small(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size)
    torch.manual_seed(2)
    moe = MoE(config)
    for p in moe.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    moe.gate.e_score_correction_bias[5] = -10.0  # never chosen
    x, up = torch.randn(2, 2, 9, hidden_size)
    results = []
    for forward in (moe, lambda rows: plain_experts(moe, rows)):
        moe.zero_grad()
        rows = x.clone().requires_grad_()
        out = forward(rows)
        out.backward(up)
        results.append([out, rows.grad, *(p.grad.clone() for p in moe.parameters())])
    for fast, plain in zip(*results, strict=True):
        assert torch.allclose(fast, plain, atol=1e-5)
    chosen = moe.gate(x)[1].unique().tolist()
    assert 5 not in chosen and len(chosen) > 4
    for grad in results[0][3:5]:  # gate_up_proj and down_proj
        assert grad.isfinite().all() and grad.abs().amax(dim=(1, 2)).nonzero().flatten().tolist() == chosen


@torch.no_grad()
def test_one_token_without_gradient_takes_the_short_way_to_the_same_numbers():
    moe = draw(small()).layers[1].mlp
    x = torch.randn(1, 1, 24)
    assert torch.allclose(moe(x), moe(x.expand(1, 2, 24))[:, :1], atol=1e-6)


@pytest.mark.parametrize("width", [8, 6])
def test_grouped_linear_equals_a_loop_also_with_empty_experts(width):
    x, weight = torch.randn(10, width), torch.randn(5, 4, width)
    ends = torch.tensor([0, 3, 3, 10, 10], dtype=torch.int32)
    right = torch.cat((x[:3] @ weight[1].T, x[3:] @ weight[3].T))
    assert torch.allclose(ours.grouped_linear(x, weight, ends), right, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast_to_bfloat16_stays_near_float32():
    config = small(hidden_size=32, moe_intermediate_size=16, kv_lora_rank=16)
    model, tokens = draw(config), ids(config, 2, 9)
    right = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
    assert (logits - right).abs().mean() < 0.1 * right.std()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --------------------------------------------------------------------------------------------------------------- the 671B model


def numbers_of(c):
    """(model, MTP module, numbers in the published files) of a config, written out by hand; the selection bias counts in the files only."""
    H, h, E = c.hidden_size, c.num_attention_heads, c.n_routed_experts
    qk = c.qk_nope_head_dim + c.qk_rope_head_dim
    attention = H * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * h * qk
    attention += H * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank + c.kv_lora_rank * h * (c.qk_nope_head_dim + c.v_head_dim)
    attention += h * c.v_head_dim * H
    dense = 3 * H * c.intermediate_size
    moe = (E + c.n_shared_experts) * 3 * H * c.moe_intermediate_size + E * H
    block = attention + 2 * H
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace
    ends = 2 * c.vocab_size * H
    whole = ends + H + c.num_hidden_layers * block + c.first_k_dense_replace * dense + moe_layers * moe
    mtp = 2 * H * H + 3 * H + block + moe
    return whole, mtp, whole + mtp + ends + (moe_layers + 1) * E


def test_the_671b_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = DeepSeekV3(V3Config.from_hf(facts.V3_CONFIG))
    mtp = sum(p.numel() for p in model.mtp.parameters())
    whole = sum(p.numel() for p in model.parameters()) - mtp
    files = checkpoint.published_parameters(model)
    assert (whole, mtp, files) == numbers_of(model.config) == (671_026_404_352, 11_610_067_968, 684_489_845_504)
    for count, name in ((whole, "v3.recomputed_total"), (mtp, "v3.mtp_unique_recomputed"), (files, "v3.hf_recomputed")):
        assert round(count / 1e9, 2) * 1e9 == pytest.approx(facts.fact(name).value, abs=1)


# -------------------------------------------------------------------------------------------------------------------------- config


NOT_NUMBERS = st.sampled_from([None, "8", True, [8], {}, float("nan"), float("inf"), -1, -0.5])
BY_TYPE = {
    int: st.one_of(NOT_NUMBERS, st.integers(max_value=-1), st.floats()),
    float: st.one_of(NOT_NUMBERS, st.floats(max_value=0), st.just(10**400), st.just(0)),
    bool: st.sampled_from([None, 0, 1, "true", []]),
}
MAY_BE_ZERO = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"}
TYPED = [f for f in fields(V3Config) if f.type in BY_TYPE]


@given(st.sampled_from(TYPED).flatmap(lambda f: st.tuples(st.just(f.name), BY_TYPE[f.type])))
@settings(max_examples=200, deadline=None)
def test_a_field_of_a_wrong_type_or_size_is_named(change):
    name, value = change
    for make in (lambda: small(**{name: value}), lambda: V3Config.from_hf(small().to_hf() | {name: value, "num_key_value_heads": None})):
        with pytest.raises(ValueError, match=name):
            make()


@pytest.mark.parametrize("name", [f.name for f in TYPED if f.type is int and f.name not in MAY_BE_ZERO] + ["q_lora_rank"])
def test_a_size_of_zero_is_named(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        small(**{name: 0})


@pytest.mark.parametrize("name, changes", [
    ("num_experts_per_tok", {"num_experts_per_tok": 5}),
    ("num_experts_per_tok", {"topk_group": 1}),
    ("qk_rope_head_dim", {"qk_rope_head_dim": 5}),
    ("n_group", {"n_group": 3}),
    ("n_group", {"n_group": 8}),
    ("topk_group", {"topk_group": 5}),
    ("first_k_dense_replace", {"first_k_dense_replace": 4}),
    ("scoring_func", {"scoring_func": "tanh"}),
    ("scoring_func", {"scoring_func": None}),
    ("q_lora_rank", {"q_lora_rank": "no"}),
    ("q_lora_rank", {"q_lora_rank": 1.5}),
    ("rope_theta", {"rope_theta": 1.0}),
    ("rope_scaling", {"rope_scaling": "yarn"}),
    ("rope_scaling", {"rope_scaling": {"type": "yarn"}}),
    ("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 2}}),
    ("rope_scaling", {"rope_scaling": {"rope_type": "llama3"}}),
    ("rope_scaling", {"rope_scaling": {}}),
    *(("rope_scaling", {"rope_scaling": YARN | change}) for change in (
        {"factor": 0.5}, {"factor": "4"}, {"factor": float("nan")}, {"factor": 10**400}, {"beta_fast": 1, "beta_slow": 32}, {"mscale": -1},
        {"original_max_position_embeddings": 0}, {"original_max_position_embeddings": None}, {"truncate": False},
        {"mscale_all_dim": True})),
])
def test_a_config_whose_parts_do_not_fit_names_the_field(name, changes):
    with pytest.raises(ValueError, match=name):
        small(**changes)
    with pytest.raises(ValueError, match=name):
        V3Config.from_hf(small().to_hf() | changes)


@pytest.mark.parametrize("name, value", [
    ("attention_bias", True), ("hidden_act", "gelu"), ("moe_layer_freq", 2), ("tie_word_embeddings", True), ("topk_method", "greedy"),
    ("model_type", "llama"), ("attention_dropout", 0.1), ("rope_interleave", False), ("mlp_bias", True), ("num_key_value_heads", 2),
    ("rope_parameters", "yarn"), ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}), ("sliding_window", 4),
])
def test_a_feature_that_is_not_computed_names_its_field(name, value):
    with pytest.raises(ValueError, match=name):
        V3Config.from_hf(small().to_hf() | {name: value})


@pytest.mark.parametrize("content", [None, [], "config", 3])
def test_a_config_that_is_no_object_is_an_error(content):
    with pytest.raises(ValueError, match="JSON object"):
        V3Config.from_hf(content)


def test_the_published_config_is_the_default_but_for_the_initial_std():
    assert V3Config.from_hf(facts.V3_CONFIG).with_(initializer_range=0.006) == V3Config.deepseek_v3()
    assert facts.fact("v3.train.init_std").value == V3Config.deepseek_v3().initializer_range


@pytest.mark.parametrize("seed", SEEDS)
def test_to_hf_and_from_hf_go_round_also_through_transformers(seed):
    config = random_config(seed)
    assert V3Config.from_hf(config.to_hf()) == config
    written = DeepseekV3Config(**config.to_hf()).to_dict()
    assert "rope_parameters" in written and "rope_scaling" not in written
    back = V3Config.from_hf(written)
    assert back.with_(rope_scaling=config.rope_scaling, norm_topk_prob=config.norm_topk_prob) == config
    for mine, other in zip(ours.rope_frequencies(config), ours.rope_frequencies(back), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))


def test_names_of_transformers_5_are_read():
    written = small(rope_scaling=YARN).to_hf()
    renamed = {k: v for k, v in written.items() if k not in ("num_nextn_predict_layers", "n_routed_experts", "rope_scaling", "rope_theta")}
    renamed |= {"num_mtp_layers": 2, "num_local_experts": 8, "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN}}
    config = V3Config.from_hf(renamed)
    assert (config.num_nextn_predict_layers, config.n_routed_experts, config.rope_theta) == (2, 8, 500.0)
    assert torch.equal(ours.rope_frequencies(config)[0], ours.rope_frequencies(small(rope_scaling=YARN, rope_theta=500.0))[0])
    for plain in ({"rope_scaling": {"rope_type": "default"}}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}):
        assert V3Config.from_hf(small().to_hf() | plain) == small()


def test_fields_that_change_nothing_are_passed_over():
    assert V3Config.from_hf(small().to_hf() | {"use_cache": True, "ep_size": 1, "auto_map": {}, "quantization_config": {}}) == small()


@st.composite
def valid_configs(draw_):
    def size(low, high):
        return draw_(st.integers(low, high))

    groups, per_group, layers = size(1, 4), size(2, 4), size(1, 3)
    topk_group = size(1, groups)
    yarn = {"type": "yarn", "factor": draw_(st.floats(1, 1e6)), "original_max_position_embeddings": size(1, 5000)}
    optional = {"mscale": st.floats(0, 2), "mscale_all_dim": st.floats(0, 2), "beta_slow": st.just(2)}
    yarn |= draw_(st.fixed_dictionaries({}, optional=optional))
    return V3Config(
        vocab_size=size(1, 20), hidden_size=size(1, 20), intermediate_size=size(1, 20), moe_intermediate_size=size(1, 9),
        num_hidden_layers=layers, num_attention_heads=size(1, 3), n_shared_experts=size(0, 2), n_routed_experts=groups * per_group,
        n_group=groups, topk_group=topk_group, num_experts_per_tok=size(1, topk_group * per_group), kv_lora_rank=size(1, 9),
        q_lora_rank=draw_(st.none() | st.integers(1, 9)), qk_rope_head_dim=2 * size(1, 4), v_head_dim=size(1, 20),
        qk_nope_head_dim=size(1, 9), first_k_dense_replace=size(0, layers), norm_topk_prob=draw_(st.booleans()),
        scoring_func=draw_(st.sampled_from(["sigmoid", "softmax"])), seq_aux=draw_(st.booleans()), num_nextn_predict_layers=size(0, 2),
        max_position_embeddings=16, rope_theta=draw_(st.floats(1.01, 1e6)), rope_scaling=draw_(st.none() | st.just(yarn)),
    )


@given(valid_configs())
@settings(max_examples=40, deadline=None)
def test_a_valid_config_builds_trains_and_writes(config):
    model = DeepSeekV3(config).train()
    tokens = ids(config, 2, 7)
    main, mtp, balance = train.losses(model, tokens)
    (main + mtp + balance).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()) and main.isfinite() and mtp.isfinite()
    model.eval()
    assert model(tokens).shape == (2, 7, config.vocab_size) and model.generate(tokens, 3).shape == (2, 10)


@given(st.integers(1, 100), st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_a_text_longer_than_the_context_is_an_error_and_one_that_fits_is_not(length, context):
    model = DeepSeekV3(small(max_position_embeddings=context, num_hidden_layers=1))
    tokens = torch.zeros(1, length, dtype=torch.long)
    if length > context:
        with pytest.raises(ValueError, match=f"max_position_embeddings={context}"):
            model(tokens)
    else:
        assert model(tokens).shape == (1, length, 61)


def test_loading_into_transformers_warns_of_nothing(tmp_path, ignore_mtp_layers, caplog):
    ignore_mtp_layers(small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs_of(draw(small()), tmp_path)
    assert not caplog.records
