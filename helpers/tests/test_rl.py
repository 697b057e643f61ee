import _thread
import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from helpers import checkpoint, countdown, data, facts, rl, store, train
from helpers.countdown import Problem
from helpers.model import DeepSeekV3, V3Config
from helpers.rl import GRPO, SFT, WORDS
from helpers.tests.test_model import draw, ignore_mtp_layers, one_thread, same_random_numbers  # noqa: F401
from helpers.tests.test_train import assert_same_bits, bits

CONFIG = V3Config.tiny(vocab_size=len(countdown.VOCABULARY), hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
                       num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=2, q_lora_rank=None, kv_lora_rank=12,
                       qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=96, initializer_range=0.15)
# A model that knows nothing is rewarded for its language, which differs from answer to answer
SETTINGS = GRPO(steps=6, questions=4, group=4, max_new_tokens=16, lr=3e-3, warmup_steps=2, weight_language=1.0)
ASKED = Problem((2, 6, 9, 1), 21)
LOOP = train.loop


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def base():
    """A model with expert biases, MTP and norms that are not at their start."""
    return draw(CONFIG)


def dense(kind):
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(countdown.VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3, tie_word_embeddings=False,
                 bos_token_id=None, eos_token_id=data.END, pad_token_id=data.END)
    return (LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**sizes))).eval()


def any_model(kind):
    return draw(CONFIG) if kind == "v3" else dense(kind)


KINDS = pytest.mark.parametrize("kind", ["v3", "llama", "qwen2"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def without_seconds(history):
    return {name: value for name, value in history.items() if name != "seconds"}


# ------------------------------------------------------------------------------------------------------------- advantages, weights, loss


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 4], [1, 1, 1, 1]])
    assert torch.allclose(rl.advantages(rewards), torch.tensor([[1.0, -1, -1, 1], [-1 / 3**0.5] * 3 + [3 / 3**0.5], [0, 0, 0, 0]]), atol=1e-5)
    assert torch.equal(rl.advantages(rewards, False), torch.tensor([[0.5, -0.5, -0.5, 0.5], [-1, -1, -1, 3], [0, 0, 0, 0]]))
    many = torch.rand(50, 8, generator=generator())
    found = rl.advantages(many)
    assert found.mean(dim=1).abs().max() < 1e-5 and (found.std(dim=1, correction=0) - 1).abs().max() < 1e-4
    assert torch.allclose(found, rl.advantages(3 * many + 2), atol=1e-4), "neither scale nor shift of the rewards matters"
    alike = torch.full((1, 3), 0.1 + 0.2)
    assert rl.advantages(alike).abs().max() < 0.2, "rounding in a group that agrees is not blown up to a signal"


def test_row_weights_are_those_of_the_textbooks():
    lengths = torch.tensor([2, 8, 10])
    assert torch.allclose(rl.row_weights(lengths, "sequence", 40), torch.tensor([1 / 6, 1 / 24, 1 / 30]))  # every answer a third
    assert torch.allclose(rl.row_weights(lengths, "token", 40), torch.full((3,), 1 / 20))  # every token of the batch a twentieth
    assert torch.allclose(rl.row_weights(lengths, "constant", 40), torch.full((3,), 1 / 120))  # by no length that the model chose
    for level in ("sequence", "token"):
        assert (rl.row_weights(lengths, level, 40) * lengths).sum().item() == pytest.approx(1)


def by_tokens(log_probs, old, advantage, lengths, level, longest, clip, kl, reference):
    """GRPO's loss and its derivative by each log-probability, one token at a time, in Python's float64; and which branches were taken."""
    B, taken = len(lengths), set()
    loss, gradient = 0.0, [[0.0] * len(log_probs[0]) for _ in range(B)]
    for i in range(B):
        for t in range(lengths[i]):
            weight = {"sequence": 1 / B / lengths[i], "token": 1 / sum(lengths), "constant": 1 / B / longest}[level]
            ratio = math.exp(log_probs[i][t] - old[i][t])
            kept = max(1 - clip, min(1 + clip, ratio)) * advantage[i]
            if ratio * advantage[i] <= kept:
                gain, slope = ratio * advantage[i], ratio * advantage[i]
                taken.add("inside" if 1 - clip <= ratio <= 1 + clip else "outside, and pulled back")
            else:
                gain, slope = kept, 0.0
                taken.add("clipped above" if ratio > 1 else "clipped below")
            if reference is not None:
                difference = reference[i][t] - log_probs[i][t]
                gain -= kl * (math.exp(difference) - difference - 1)
                slope -= kl * (1 - math.exp(difference))
            loss -= weight * gain
            gradient[i][t] = -weight * slope
    return loss, gradient, taken


@pytest.mark.parametrize("level", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradient_are_those_of_a_loop_over_tokens(level, kl, dtype):
    branches = set()
    for seed in range(8):
        g = generator(seed)
        B, n, longest = 7, 9, 12
        lengths = torch.randint(1, n + 1, (B,), generator=g)
        lengths[0] = n
        old = -3 * torch.rand(B, n, generator=g, dtype=dtype)
        log_probs = (old + 0.4 * torch.randn(B, n, generator=g, dtype=dtype)).requires_grad_()
        reference = old + 0.5 * torch.randn(B, n, generator=g, dtype=dtype) if kl else None
        advantage = torch.randn(B, generator=g, dtype=dtype)
        inside = torch.arange(n) < lengths[:, None]
        weights = rl.row_weights(lengths, level, longest)[:, None].to(dtype) * inside
        loss = rl.grpo_loss(log_probs, old, advantage, weights, 0.2, kl, reference)
        loss.backward()
        by_hand, gradient, taken = by_tokens(log_probs.tolist(), old.tolist(), advantage.tolist(), lengths.tolist(), level, longest, 0.2, kl,
                                             reference.tolist() if kl else None)
        branches |= taken
        close = 2e-5 if dtype == torch.float32 else 1e-7  # row_weights are float32
        assert loss.item() == pytest.approx(by_hand, rel=close, abs=close) and loss.dtype == dtype
        assert torch.allclose(log_probs.grad, torch.tensor(gradient, dtype=dtype), atol=close)
        assert (log_probs.grad[~inside] == 0).all() and log_probs.grad[inside].abs().sum() > 0
        with torch.no_grad():  # what stands in the padding does not matter
            spoilt = [torch.where(inside, x, x - 20 * torch.rand(B, n, generator=g, dtype=dtype)) for x in (log_probs, old)]
            assert rl.grpo_loss(*spoilt, advantage, weights, 0.2, kl, reference).item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert branches == {"inside", "outside, and pulled back", "clipped above", "clipped below"}


def test_four_answers_by_hand():
    """Two tokens each, the ratio of one token of each row moved; clip 0.2."""
    ratio = torch.tensor([[1.0, 1.5], [1.0, 0.5], [1.0, 1.5], [1.0, 0.5]])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    weights = rl.row_weights(torch.full((4,), 2), "sequence", 2)[:, None].expand(4, 2)
    gains = [1 + 1.2, 1 + 0.5, -1 - 1.5, -1 - 0.8]
    assert rl.grpo_loss(ratio.log(), torch.zeros(4, 2), advantage, weights, 0.2).item() == pytest.approx(-sum(gains) / 8, rel=1e-6)
    same = torch.zeros(4, 2)
    assert rl.grpo_loss(same, same, advantage, weights, 0.2).item() == pytest.approx(0), "the advantages add up to 0, so the loss starts there"
    k3 = 0.5 * (math.exp(0.1) - 0.1 - 1)  # the estimate of KL where the reference says 0.1 more
    assert rl.grpo_loss(same, same, advantage, weights, 0.2, 0.5, same + 0.1).item() == pytest.approx(k3, rel=1e-3)


def test_micro_batches_hold_every_row_once_and_few_padded_tokens():
    rng = random.Random(0)
    for limit in (1, 50, 4096):
        lengths = torch.tensor([rng.randint(1, 200) for _ in range(97)])
        parts = rl.micro_batches(lengths, limit)
        assert sorted(torch.cat(parts).tolist()) == list(range(97))
        assert all(len(part) == 1 or len(part) * int(lengths[part].max()) <= limit for part in parts)
        longest = [int(lengths[part].max()) for part in parts]
        assert longest == sorted(longest, reverse=True) and len(parts) <= 1 + 2 * int(lengths.sum()) / limit + (limit == 50) * 97
    assert rl.micro_batches(torch.tensor([], dtype=torch.long)) == []


# -------------------------------------------------------------------------------------------------------- rollouts and log-probabilities


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_a_rollout_has_the_texts_lengths_and_log_probs_of_what_was_drawn(kind, temperature):
    model = any_model(kind)
    head = model.lm_head.weight.data
    problems = countdown.problems("train", 40, 3)
    n = 30
    if kind == "v3":
        head[data.END] += head[data.END] * 0.2
    answers = rl.rollout(model, problems, n, generator(), temperature)
    tokens, log_probs, lengths, texts = answers
    P = tokens.shape[1] - log_probs.shape[1]
    assert P == 9 and log_probs.shape[1] <= n and len(texts) == 40
    early = cut = 0
    for row, length, problem, text in zip(tokens.tolist(), lengths.tolist(), problems, texts, strict=True):
        assert row[:P] == [data.END, *WORDS.encode(problem.prompt).ids]
        answer = row[P:]
        ended = data.END in answer
        assert length == (answer.index(data.END) + 1 if ended else n) and all(token == data.END for token in answer[length:])
        assert text.split() == [countdown.VOCABULARY[token] for token in answer[:length] if token != data.END]
        early, cut = early + (ended and length < n), cut + (not ended)
    if temperature:
        assert early and cut, "rows that end early and rows that are cut off are both here"
    inside = torch.arange(log_probs.shape[1]) < lengths[:, None]
    with torch.no_grad():
        again = rl.token_log_probs(model, tokens, P)
        one_by_one = torch.cat([model(row[None, :-1]) if kind == "v3" else model(row[None, :-1]).logits for row in tokens])
    plain = one_by_one.log_softmax(dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, P - 1 :]
    assert ((log_probs - again).abs() * inside).max() < 1e-4 and torch.allclose(again, plain, atol=1e-4)
    assert not log_probs.is_inference() and not tokens.is_inference(), "training may use them"
    same = rl.rollout(model, problems, n, generator(), temperature)
    assert same.texts == texts and torch.equal(same.log_probs, log_probs)
    if temperature:
        assert rl.rollout(model, problems, n, generator(1), temperature).texts != texts
    else:
        assert (plain[inside] == one_by_one.log_softmax(dim=-1).max(dim=-1).values[:, P - 1 :][inside]).float().mean() > 0.98


@KINDS
def test_a_rollout_draws_from_the_models_distribution_and_leaves_the_global_generator_alone(kind):
    model = any_model(kind)
    state = torch.random.get_rng_state()
    first = rl.rollout(model, [ASKED] * 3000, 1, generator(4)).tokens[:, -1]
    assert torch.equal(state, torch.random.get_rng_state())
    prompt = torch.tensor([[data.END, *WORDS.encode(ASKED.prompt).ids]])
    with torch.no_grad():
        p = (model(prompt) if kind == "v3" else model(prompt).logits)[0, -1].softmax(dim=-1)
    share = torch.bincount(first, minlength=len(p)) / 3000
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 3000).sqrt() + 1e-3).all()
    assert len(first.unique()) > 50, "no truncation to the best 50 tokens"


@KINDS
def test_many_are_sampled_in_parts_and_padded(kind):
    model, problems = any_model(kind), countdown.problems("train", 520, 3)
    many = rl.sampled(model, problems, 5, seed=7)
    g = generator(7)
    parts = [rl.rollout(model, problems[:512], 5, g), rl.rollout(model, problems[512:], 5, g)]
    assert many.tokens.shape == (520, 14) and many.log_probs.shape == (520, 5)
    assert many.texts == parts[0].texts + parts[1].texts and torch.equal(many.lengths, torch.cat([p.lengths for p in parts]))
    for got, part in ((many.tokens[:512], parts[0].tokens), (many.tokens[512:], parts[1].tokens)):
        assert torch.equal(got[:, : part.shape[1]], part) and (got[:, part.shape[1] :] == data.END).all()
    assert rl.measure(problems, many)["cut_off"] == pytest.approx((many.tokens[:, -1] != data.END).float().mean().item())


@KINDS
def test_log_probs_have_gradients(kind):
    model = any_model(kind)
    tokens = rl.rollout(model, [ASKED] * 3, 5, generator()).tokens
    rl.token_log_probs(model, tokens, 9).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for name, p in model.named_parameters() if not name.startswith("mtp."))
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("mtp."))


def rollout_of(texts, width, ended):
    """A Rollout of answers that are given."""
    rows = [WORDS.encode(text).ids + [data.END] * end for text, end in zip(texts, ended, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([[5] * 9 + row + [data.END] * (width - len(row)) for row in rows])
    return rl.Rollout(tokens, torch.zeros(len(rows), width), lengths, texts)


def test_measure_by_hand():
    right = "<think> try 2 * 6 check 21 right wait wait </think> <answer> 2 * 6 + 9 * 1 </answer>"  # 21 tokens, all English
    mixed = "<think> try prueba check </think> <answer> 2 + 6 + 9 + 1 </answer>"  # a third in Spanish
    silent = "2 2 2"
    cut = "prueba espera revisa bien 2 2 2 2 2 2 2"
    problems = [ASKED, ASKED, replace(ASKED, language="es"), replace(ASKED, language="es")]
    texts = [right, mixed, silent, cut]
    width = len(right.split()) + 1
    cut += " 2" * (width - len(cut.split()))
    texts[3] = cut
    seen = rl.measure(problems, rollout_of(texts, width, [1, 1, 1, 0]))
    assert seen.pop("cut_off") == pytest.approx(1 / 4)
    lengths = [len(text.split()) + 1 for text in texts[:3]] + [width]
    assert seen.pop("length") == pytest.approx(sum(lengths) / 4)
    assert seen == pytest.approx({
        "accuracy": 1 / 4, "format": 2 / 4, "readable": 0, "tries": (1 + 2 + 0 + 1) / 4, "verify": 3 / 4, "waits": (2 + 0 + 0 + 1) / 4,
        "mixed": 1 / 4, "consistency": (1 + 2 / 3 + 1) / 3, "consistency_en": (1 + 2 / 3) / 2, "consistency_es": 1})
    nobody = rl.measure(problems[2:3], rollout_of([silent], 4, [1]))
    assert all(math.isnan(nobody[name]) for name in ("consistency", "consistency_en", "consistency_es")) and nobody["cut_off"] == 0
    assert rl.measure(problems[:1], rollout_of([right], width, [1]), "+-")["accuracy"] == 0


# ----------------------------------------------------------------------------------------------------------------- settings and reward


@pytest.mark.parametrize("change", [{"level": "word"}, {"steps": 0}, {"questions": 0}, {"group": 1}, {"group": 0}, {"max_new_tokens": 0},
                                    {"updates": 0}, {"refresh": 0}, {"steps": 1.5}, {"questions": True}, {"group": "8"}, {"updates": -1},
                                    {"updates": 65}],
                         ids=str)
def test_a_setting_that_cannot_work_is_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        GRPO(**change)


def test_the_defaults_that_the_papers_give():
    assert GRPO().level == "sequence" and GRPO().divide_by_std and GRPO().beta1 == facts.fact("v3.train.beta1").value


def test_the_reward_is_the_sum_of_its_parts():
    text = "<think> try check bien </think> <answer> 2 * 6 + 9 * 1 </answer> check 21 right"
    plain = GRPO(weight_format=0.0)
    assert rl.reward(plain, ASKED, text) == 1
    assert rl.reward(replace(plain, weight_format=0.25), ASKED, text) == 1.25
    assert rl.reward(replace(plain, weight_language=3.0), ASKED, text) == pytest.approx(3)
    assert rl.reward(replace(plain, weight_readable=0.5), ASKED, text) == 1.5
    assert rl.reward(replace(plain, operators="+-"), ASKED, text) == 0
    assert rl.reward(GRPO(), ASKED, "") == 0


# -------------------------------------------------------------------------------------------------------------- one step, by another way


class _SGD(torch.optim.SGD):
    """w - gradient, so that the change of the weights shows the gradient."""


@pytest.fixture
def plain_steps(monkeypatch):
    monkeypatch.setattr(train, "adamw", lambda model, settings: _SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize("variant", [{}, {"level": "token"}, {"level": "constant"}, {"divide_by_std": False}, {"kl": 0.5},
                                     {"level": "token", "kl": 0.5}], ids=str)
def test_a_step_changes_the_weights_by_the_gradient_of_the_papers_loss(base, plain_steps, monkeypatch, variant):
    """The loss of the step built again answer by answer, without padding, parts or dropped groups."""
    settings = replace(SETTINGS, steps=1, updates=1, warmup_steps=1, lr=0.05, grad_clip=1e9, questions=6, max_new_tokens=40, **variant)
    drawn, rollout, micro = [], rl.rollout, rl.micro_batches
    monkeypatch.setattr(rl, "rollout", lambda *args: drawn.append(rollout(*args)) or drawn[-1])
    monkeypatch.setattr(rl, "micro_batches", lambda lengths: micro(lengths, 100))
    base.lm_head.weight.data[data.END] *= 1.5
    model, history = rl.grpo(base, settings, "one step")
    [answers] = drawn
    assert len(answers.lengths.unique()) > 3 and answers.lengths.min() < 40
    asked = [p for p in countdown.problems("train", 6, 0) for _ in range(4)]
    exact = copy.deepcopy(base)
    loss, terms = 0.0, 0.0
    for i, (problem, length, text) in enumerate(zip(asked, answers.lengths.tolist(), answers.texts, strict=True)):
        group = [rl.reward(settings, problem, t) for t in answers.texts[i - i % 4 : i - i % 4 + 4]]
        mean = sum(group) / 4
        std = (sum((r - mean) ** 2 for r in group) / 4) ** 0.5 + 1e-6
        advantage = (rl.reward(settings, problem, text) - mean) / (std if settings.divide_by_std else 1)
        row = answers.tokens[i, : 9 + length]
        log_probs = exact(row[None, :-1])[0].double().log_softmax(dim=-1)[torch.arange(8, 8 + length), row[9:]]
        ratio = (log_probs - log_probs.detach()).exp()
        difference = log_probs.detach() - log_probs  # the reference is the base itself
        gain = ratio * advantage - settings.kl * (difference.exp() - difference - 1)
        weight = {"sequence": 1 / 24 / length, "token": 1 / int(answers.lengths.sum()), "constant": 1 / 24 / 40}[settings.level]
        loss, terms = loss - (gain * weight).sum(), terms + abs(advantage)
    loss.backward()
    assert terms > 3 and history["loss"] == [pytest.approx(loss.item(), abs=1e-5)]
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    before, after, largest = base.state_dict(), model.state_dict(), 0.0
    for name, gradient in gradients.items():
        step = (before[name] - after[name]) / 0.05
        expected = torch.zeros_like(step) if gradient is None else gradient
        assert torch.allclose(step, expected, atol=2e-5, rtol=1e-3), name
        largest = max(largest, expected.abs().max().item())
    assert largest > 1e-3


def test_each_update_sees_its_part_of_the_questions_and_the_second_one_a_changed_policy(base, monkeypatch):
    seen, part_loss = [], rl._part_loss

    def watched(model, reference, answers, rows, advantage, weight, settings):
        result = part_loss(model, reference, answers, rows, advantage, weight, settings)
        seen.append((rows.tolist(), result[1], weight[rows] * answers.lengths[rows]))
        return result

    monkeypatch.setattr(rl, "_part_loss", watched)
    _, history = rl.grpo(base, replace(SETTINGS, steps=1, updates=2, kl=0.01), "updates")
    first, second = seen
    assert sorted(first[0] + second[0]) == list(range(16)) and len(first[0]) == len(second[0]) == 8
    assert all({4 * (r // 4) + k for k in range(4)} <= set(rows) for rows, _, _ in seen for r in rows), "a group stays together"
    assert first[1] < 1e-4 < second[1] and history["gap"] == [first[1]]
    assert all(torch.allclose(share, torch.full((8,), 1 / 8)) for _, _, share in seen), "every answer of an update weighs an eighth"


def test_groups_that_agree_are_left_out_and_teach_nothing(base, monkeypatch):
    monkeypatch.setattr(rl, "reward", lambda settings, problem, text: 0.3)
    model, history = rl.grpo(base, SETTINGS, "alike", folder=None)
    assert not changed(base.state_dict(), model.state_dict()) and history["loss"] == [0.0] * 6 and history["clipped"] == [0.0] * 6
    rewards = iter([0.3] * 4 + [0.0, 1.0, 0.0, 1.0] + [0.7] * 8)
    monkeypatch.setattr(rl, "reward", lambda settings, problem, text: next(rewards))
    rows, part_loss = [], rl._part_loss
    monkeypatch.setattr(rl, "_part_loss", lambda *args: rows.extend(args[3].tolist()) or part_loss(*args))
    rl.grpo(base, replace(SETTINGS, steps=1, updates=1), "one group")
    assert sorted(rows) == [4, 5, 6, 7]


def test_the_reward_goes_up_when_it_is_within_reach(base):
    settings = replace(SETTINGS, steps=40, questions=8, group=8, lr=1e-2)
    _, history = rl.grpo(base, settings, "up")
    first, last = (sum(part) / len(part) for part in (history["reward"][:6], history["reward"][-6:]))
    assert last > first + 0.25, (first, last)


def test_the_history_of_grpo(base):
    seen = []
    settings = replace(SETTINGS, steps=5)
    model, history = rl.grpo(base, settings, "history", watch=lambda model, step: seen.append(weights_of(model)) or {"step": step}, watch_at=(0, 3))
    assert history["watch"] == [{"step": 0}, {"step": 3}, {"step": 5}]
    assert not changed(base.state_dict(), seen[0]) and not changed(model.state_dict(), seen[2]) and changed(seen[1], seen[2])
    assert {name: len(history[name]) for name in history if name not in ("watch", "seconds")} == dict.fromkeys((
        "accuracy", "format", "readable", "tries", "verify", "waits", "mixed", "consistency", "consistency_en", "consistency_es", "length", "cut_off",
        "reward", "loss", "gap", "clipped"), 5)
    assert max(history["gap"]) < 1e-4 and abs(history["loss"][0]) < 0.5 and history["seconds"] > 0
    assert all(0 <= value <= 1 for value in history["clipped"]) and max(history["clipped"]) > 0
    json.dumps(history, allow_nan=False)
    asked = [p for p in countdown.problems("train", 4, 0) for _ in range(4)]
    answers = rl.rollout(base, asked, 16, generator(0))
    assert history["reward"][0] == pytest.approx(sum(rl.reward(settings, p, t) for p, t in zip(asked, answers.texts, strict=True)) / 16)
    assert {name: history[name][0] for name in ("length", "tries")} == pytest.approx({k: rl.measure(asked, answers)[k] for k in ("length", "tries")})


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_base_mtp_and_expert_biases_stay_as_they_are(base, kl):
    before, state = weights_of(base), torch.random.get_rng_state()
    trained = [rl.grpo(base, replace(SETTINGS, steps=3, kl=kl, weight_decay=0.1), "grpo")[0], rl.sft(base, EXAMPLES, LESSON, "sft")[0]]
    assert not changed(before, base.state_dict()) and not base.training and all(p.grad is None for p in base.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    for model in trained:
        moved = changed(before, model.state_dict())
        still = {name for name in before if name.startswith("mtp.") or name.endswith("e_score_correction_bias")}
        assert len(still) > 10 and moved == set(before) - still
        assert all(router.load.sum() == 0 for router in model.routers()) and not model.training


@KINDS
def test_the_reference_is_a_copy_of_the_policy_made_every_so_many_steps(kind, monkeypatch):
    base = any_model(kind)
    seen, part_loss = [], rl._part_loss

    def watched(model, reference, *rest):
        seen.append((rl.fingerprint(model), rl.fingerprint(reference)))
        return part_loss(model, reference, *rest)

    monkeypatch.setattr(rl, "_part_loss", watched)
    rl.grpo(base, replace(SETTINGS, steps=5, updates=1, kl=0.1, refresh=2), "refresh")
    policies, references = zip(*seen, strict=True)
    assert len(set(policies)) == 5 and policies[0] == rl.fingerprint(base)
    assert references == (policies[0], policies[0], policies[2], policies[2], policies[4])
    seen.clear()
    rl.grpo(base, replace(SETTINGS, steps=3, updates=1, kl=0.1), "no refresh")
    assert {reference for _, reference in seen} == {rl.fingerprint(base)}


def test_a_strong_kl_term_holds_the_policy_near_the_reference(base):
    def distance(model):
        tokens = rl.rollout(base, countdown.problems("dev", 32, 0), 16, generator(9)).tokens
        with torch.no_grad():
            return (rl.token_log_probs(model, tokens, 9) - rl.token_log_probs(base, tokens, 9)).abs().mean().item()

    settings = replace(SETTINGS, steps=10)
    free, held = (distance(rl.grpo(base, replace(settings, kl=kl), "kl")[0]) for kl in (0.0, 3.0))
    assert held < 0.7 * free, (held, free)


def test_every_step_asks_and_draws_anew_and_for_the_settings_seed(base, monkeypatch):
    drawn, rollout = [], rl.rollout
    monkeypatch.setattr(rl, "rollout", lambda model, asked, n, g: drawn.append((asked, g.initial_seed())) or rollout(model, asked, n, g))
    for seed in (0, 1):
        rl.grpo(base, replace(SETTINGS, steps=3, seed=seed), "seeds")
    assert len({draw for _, draw in drawn}) == len({tuple(asked) for asked, _ in drawn}) == 6
    assert all(asked[i] == asked[i - i % 4] for asked, _ in drawn for i in range(16))
    assert {p.digits for asked, _ in drawn for p in asked} <= set(countdown.tuples("train"))


def test_the_learning_rate_warms_up(base, monkeypatch):
    rates, clip = [], torch.nn.utils.clip_grad_norm_
    optimizers, adamw = [], train.adamw
    monkeypatch.setattr(train, "adamw", lambda *args: optimizers.append(adamw(*args)) or optimizers[-1])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: rates.append(optimizers[0].param_groups[0]["lr"]) or clip(*args))
    rl.grpo(base, replace(SETTINGS, steps=4, updates=1, lr=1.0, warmup_steps=4, kl=0.1), "warm-up")
    assert rates == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("change", [{"questions": 3, "updates": 2}, {"questions": 3, "updates": 3, "level": "token"}], ids=str)
def test_updates_need_not_divide_the_questions(base, change):
    _, history = rl.grpo(base, replace(SETTINGS, steps=2, **change), "uneven")
    assert len(history["loss"]) == 2 and all(map(math.isfinite, history["loss"]))


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(base, tmp_path):
    with pytest.raises(train.TrainingDiverged, match=r"loss is (nan|inf|-inf) at step \d+;.*lower lr"):
        rl.grpo(base, replace(SETTINGS, steps=20, lr=1e30, warmup_steps=1, kl=0.1), "diverged", folder=tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------------- fine-tuning


def examples(n):
    rng = random.Random(0)
    pairs = []
    for problem in countdown.problems("train", n, 8):
        thoughts, expression = countdown.search(problem, rng, tries=2)
        pairs.append((problem.prompt, countdown.answer_text(thoughts, expression)))
    return pairs


EXAMPLES, LESSON = examples(22), SFT(epochs=2, batch_size=5, lr=3e-3)


@KINDS
def test_fine_tuning_learns_the_answers_and_only_them(kind):
    base = any_model(kind)
    before = weights_of(base)
    model, history = rl.sft(base, EXAMPLES, replace(LESSON, epochs=6), "sft")
    assert len(history["loss"]) == 6 * 5 and history["loss"][-1] < history["loss"][0] - 1 and not model.training
    assert not changed(before, base.state_dict())

    def mean(model):
        total = count = 0
        for prompt, answer in EXAMPLES:
            row = torch.tensor([data.END, *WORDS.encode(prompt).ids, *WORDS.encode(answer).ids, data.END])
            with torch.no_grad():
                scores = (model(row[None, :-1]) if kind == "v3" else model(row[None, :-1]).logits)[0].log_softmax(dim=-1)
            n = len(answer.split()) + 1
            total, count = total - scores[torch.arange(len(row) - 1), row[1:]][-n:].sum().item(), count + n
        return total / count

    for by_length in (True, False):  # False: the batch is calculated in parts of like length
        _, whole = rl.sft(base, EXAMPLES, replace(LESSON, epochs=1, batch_size=100, by_length=by_length), "one batch")
        assert whole["loss"] == [pytest.approx(mean(base), rel=1e-4)], "the mean over all tokens of the answers, their end included"
    assert mean(model) < mean(base) - 1


def test_an_epoch_takes_every_example_once_in_an_order_of_its_own(base, monkeypatch):
    seen, log_probs = [], rl.token_log_probs
    monkeypatch.setattr(rl, "token_log_probs", lambda model, tokens, prompt: seen.append(tokens) or log_probs(model, tokens, prompt))
    rl.sft(base, EXAMPLES, LESSON, "order")
    assert [len(tokens) for tokens in seen[:5]].count(5) == 4 and sum(map(len, seen[:5])) == 22
    expected = sorted(f"{prompt} {answer}" for prompt, answer in EXAMPLES)
    epochs = [[WORDS.decode(row.tolist()) for tokens in seen[n : n + 5] for row in tokens] for n in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected and epochs[0] != epochs[1]


def test_a_batch_of_all_lengths_in_parts_teaches_what_the_whole_batch_does(base):
    lesson = replace(LESSON, epochs=4, batch_size=100)
    whole, parts = (rl.sft(base, examples(60), replace(lesson, by_length=by_length), "parts")[1]["loss"] for by_length in (True, False))
    assert parts == pytest.approx(whole, rel=1e-3) and whole[-1] < whole[0] - 0.1


@pytest.mark.parametrize("by_length", [True, False])
def test_batches_hold_like_lengths_or_all_lengths(base, monkeypatch, by_length):
    """A word's weight in the epoch's losses: the same for all only where every batch mixes the lengths."""
    short, long = ("make 5 from 5 1 9 9 A", "right"), ("make 5 from 5 1 9 9 A", "try " * 30)
    seen, log_probs = [], rl.token_log_probs
    monkeypatch.setattr(rl, "token_log_probs", lambda model, tokens, prompt: seen.append(tokens) or log_probs(model, tokens, prompt))
    rl.sft(base, [short, long] * 20, replace(LESSON, batch_size=10, by_length=by_length), "lengths")
    shorts = [sum(len(WORDS.decode(row.tolist()).split()) < 20 for row in tokens) for tokens in seen[:4]]
    assert sum(shorts) == 20 and (sorted(shorts) == [0, 0, 10, 10]) == by_length


def test_the_learning_rate_of_fine_tuning_falls_to_a_tenth(base, monkeypatch):
    rates, optimizers, adamw, clip = [], [], train.adamw, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(train, "adamw", lambda *args: optimizers.append(adamw(*args)) or optimizers[-1])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: rates.append(optimizers[0].param_groups[0]["lr"]) or clip(*args))
    rl.sft(base, EXAMPLES, replace(LESSON, epochs=8, lr=0.01), "rates")
    assert rates[0] == pytest.approx(0.01) and rates[20] == pytest.approx(0.0055) and rates[-1] == pytest.approx(0.001, rel=0.02)
    assert rates == sorted(rates, reverse=True)


def test_fine_tuning_can_teach_a_text_by_heart():
    """The whole way round: what is learnt is what is sampled."""
    model, _ = rl.sft(draw(CONFIG), EXAMPLES[:2], SFT(epochs=150, batch_size=2, lr=1e-2), "by heart")
    problems = countdown.problems("train", 2, 8)
    assert rl.rollout(model, problems, 60, generator(), 0.0).texts == [answer for _, answer in EXAMPLES[:2]]


# ------------------------------------------------------------------------------------------------- stopped, killed, kept, read again


def train_some(kind, base, folder=None, **more):
    if kind == "sft":
        return rl.sft(base, EXAMPLES, LESSON, "some", folder)
    return rl.grpo(base, replace(SETTINGS, steps=10, refresh=4, kl=0.1 if kind == "grpo with a reference" else 0.0), "some", folder=folder, **more)


WAYS = pytest.mark.parametrize("kind", ["grpo", "grpo with a reference", "sft"])


def save_every(monkeypatch, n):
    monkeypatch.setattr(train, "loop", lambda *args: LOOP(*args[:9], n, *args[10:]))


def interrupted(monkeypatch, at, act=_thread.interrupt_main):
    """Let Ctrl-C come in the midst of step `at`, once; returns a list with an entry for each optimizer step begun."""
    steps, clip = [], torch.nn.utils.clip_grad_norm_

    def counted(*args):
        steps.append(1)
        if len(steps) == at:
            act()
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    return steps


@WAYS
def test_stopped_by_ctrl_c_the_same_call_ends_in_the_same_bits(base, kind, tmp_path, monkeypatch, capsys):
    whole, history = train_some(kind, base, tmp_path / "whole")
    a_step = 1 if kind == "sft" else 2  # optimizer steps in one
    steps = interrupted(monkeypatch, 5 * a_step + 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_some(kind, base, tmp_path / "run")
    assert len(steps) == 6 * a_step and signal.getsignal(signal.SIGINT) is handler
    assert "stopped after step 6 of 10: saved in run; the same call goes on from there" in capsys.readouterr().out
    assert checkpoint.load_training(tmp_path / "run")[1]["step"] == 6
    model, again = train_some(kind, base, tmp_path / "run")
    assert len(steps) == 10 * a_step and without_seconds(again) == without_seconds(history)
    assert_same_bits(bits(tmp_path / "run"), bits(tmp_path / "whole"))
    assert not changed(whole.state_dict(), model.state_dict())
    references = [name for name in checkpoint.load_training(tmp_path / "run")[0] if name.startswith("reference.")]
    assert bool(references) == (kind == "grpo with a reference")


@WAYS
def test_cut_off_in_the_midst_of_a_step_it_goes_on_from_the_last_checkpoint(base, kind, tmp_path, monkeypatch):
    train_some(kind, base, tmp_path / "whole")
    save_every(monkeypatch, 3)

    def cut():
        raise RuntimeError("power cut")

    interrupted(monkeypatch, 8 if kind == "sft" else 16, cut)  # between the two updates of step 8 in GRPO
    with pytest.raises(RuntimeError, match="power cut"):
        train_some(kind, base, tmp_path / "run")
    assert checkpoint.load_training(tmp_path / "run")[1]["step"] == 6
    train_some(kind, base, tmp_path / "run")
    assert_same_bits(bits(tmp_path / "run"), bits(tmp_path / "whole"))


def test_cut_off_after_a_checkpoint_at_a_step_that_is_watched_nothing_is_watched_twice(base, tmp_path, monkeypatch):
    save_every(monkeypatch, 3)
    watched = {"watch": lambda model, step: {"step": step}, "watch_at": (0, 3, 6)}
    _, whole = train_some("grpo", base, tmp_path / "whole", **watched)

    def cut():
        raise RuntimeError("power cut")

    interrupted(monkeypatch, 16, cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train_some("grpo", base, tmp_path / "run", **watched)
    _, history = train_some("grpo", base, tmp_path / "run", **watched)
    assert whole["watch"] == [{"step": step} for step in (0, 3, 6, 10)]
    assert history["watch"] == whole["watch"] and without_seconds(history) == without_seconds(whole)


def test_a_run_in_which_nothing_could_be_learnt_can_be_read_again(base, monkeypatch, tmp_path):
    monkeypatch.setattr(rl, "reward", lambda settings, problem, text: 0.0)
    first = rl.grpo(base, replace(SETTINGS, steps=2), "nothing", folder=tmp_path / "run")
    again = rl.grpo(base, replace(SETTINGS, steps=2), "nothing", folder=tmp_path / "run")
    assert first[1] == again[1] and not changed(base.state_dict(), again[0].state_dict())


SCRIPT = """
import json
import sys
import torch
from helpers import rl, train
from helpers.model import DeepSeekV3, V3Config
torch.set_num_threads(1)
torch.manual_seed(5)
folder, config, settings, lesson, examples = sys.argv[1:]
base, loop = DeepSeekV3(V3Config(**json.loads(config))).eval(), train.loop
train.loop = lambda *args: loop(*args[:9], 3, *args[10:])
model, _ = rl.grpo(base, rl.GRPO(**json.loads(settings)), "killed", folder=folder + "/grpo")
rl.sft(model, json.loads(examples), rl.SFT(**json.loads(lesson)), "killed", folder + "/sft")
"""


def test_killed_in_grpo_and_in_fine_tuning_and_run_again_they_end_in_the_same_bits(tmp_path):
    """RL with a reference that is refreshed, then fine-tuning of what came out; killed once in each, the second time while it writes."""
    settings, lesson = replace(SETTINGS, steps=20, refresh=4, kl=0.1), replace(LESSON, epochs=6)
    run, rng, killed = tmp_path / "run", random.Random(0), []

    def start():
        words = [json.dumps(part) for part in (asdict(CONFIG), asdict(settings), asdict(lesson), EXAMPLES)]
        return subprocess.Popen([sys.executable, "-c", SCRIPT, run, *words], cwd=Path(rl.__file__).parent.parent, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})

    for part in ("grpo", "sft"):
        process = start()
        while process.poll() is None and not (run / part / "latest").is_symlink():
            time.sleep(0.002)
        while part == "sft" and process.poll() is None and not any((run / part).glob(".part-*")):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended before it could be killed"
        killed.append(checkpoint.load_training(run / part)[1]["step"])
    process = start()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert 0 < killed[0] < 20 and 0 < killed[1] < 30
    torch.manual_seed(5)
    model, _ = rl.grpo(DeepSeekV3(CONFIG).eval(), settings, "whole", folder=tmp_path / "grpo")
    rl.sft(model, EXAMPLES, lesson, "whole", tmp_path / "sft")
    for part in ("grpo", "sft"):
        assert_same_bits(bits(run / part), bits(tmp_path / part))
        assert any(name.startswith("reference.") for name in checkpoint.load_training(run / part)[0]) == (part == "grpo")


def test_a_finished_run_is_read_and_not_trained(base, monkeypatch):
    for kind in ("grpo", "grpo with a reference", "sft"):
        model, history = train_some(kind, base)
        monkeypatch.setattr(rl, "token_log_probs", None)
        again, same = train_some(kind, base)
        monkeypatch.undo()
        monkeypatch.setenv("V3LAB_HOME", str(store.home()))
        assert same == history and not changed(model.state_dict(), again.state_dict()) and not again.training


def test_another_base_settings_or_examples_is_another_run(base, tmp_path):
    def folders():
        return {path.name for path in store.cache_dir().iterdir()} if store.cache_dir().exists() else set()

    other = copy.deepcopy(base)
    with torch.no_grad():
        other.layers[1].mlp.gate.e_score_correction_bias[0] += 0.25
    few = replace(SETTINGS, steps=1)
    calls = [lambda: rl.grpo(base, few, "My Run"), lambda: rl.grpo(other, few, "My Run"), lambda: rl.grpo(base, replace(few, seed=1), "My Run"),
             lambda: rl.grpo(base, few, "My Run", watch_at=(0,), watch=lambda model, step: step), lambda: rl.sft(base, EXAMPLES, LESSON, "My Run"),
             lambda: rl.sft(other, EXAMPLES, LESSON, "My Run"), lambda: rl.sft(base, EXAMPLES[1:], LESSON, "My Run"),
             lambda: rl.sft(base, EXAMPLES, replace(LESSON, lr=1e-4), "My Run")]
    for n, call in enumerate(calls, start=1):
        call()
        assert len(folders()) == n and all(name.startswith("my-run-") for name in folders())
    calls[0]()
    assert len(folders()) == len(calls)
    rl.grpo(base, few, "x", folder=tmp_path / "kept")
    before = bits(tmp_path / "kept")
    for model, settings, name in ((other, few, "base"), (base, replace(few, lr=1e-5), "settings")):
        with pytest.raises(ValueError, match=f"was made with another {name}"):
            rl.grpo(model, settings, "x", folder=tmp_path / "kept")
    with pytest.raises(ValueError, match="was made with another"):
        rl.sft(base, EXAMPLES, LESSON, "x", tmp_path / "kept")
    assert_same_bits(bits(tmp_path / "kept"), before)


def test_every_setting_is_part_of_what_a_run_is_known_by():
    assert set(asdict(GRPO())) >= {"seed", "level", "kl", "refresh", "operators", "weight_readable"} and json.dumps(asdict(GRPO()))


def test_two_seeds_differ_and_one_seed_repeats(base, tmp_path):
    runs = [rl.grpo(base, replace(SETTINGS, steps=2, seed=seed), "seeds", folder=tmp_path / str(n))[0] for n, seed in enumerate((0, 0, 1))]
    assert not changed(runs[0].state_dict(), runs[1].state_dict()) and changed(runs[0].state_dict(), runs[2].state_dict())


def test_a_fingerprint_changes_with_every_weight_and_bias(base):
    seen = {rl.fingerprint(base), rl.fingerprint(copy.deepcopy(base).to(torch.bfloat16))}
    assert rl.fingerprint(copy.deepcopy(base)) in seen
    for name in base.state_dict():
        changed_one = copy.deepcopy(base)
        changed_one.state_dict()[name].view(-1)[0] += 1e-3
        seen.add(rl.fingerprint(changed_one))
    assert len(seen) == 2 + len(base.state_dict()) and all(len(digits) == 16 for digits in seen)


# ------------------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_dense_students_go_through_grpo(kind, kl):
    base = dense(kind)
    before = weights_of(base)
    model, history = rl.grpo(base, replace(SETTINGS, steps=3, kl=kl), "student")
    assert type(model) is type(base) and not changed(before, base.state_dict()) and changed(before, model.state_dict()) == set(before)
    assert max(history["gap"]) < 1e-4 and len(history["reward"]) == 3 and not store.cache_dir().exists()
    again, same = rl.grpo(base, replace(SETTINGS, steps=3, kl=kl), "student")
    assert without_seconds(same) == without_seconds(history) and not changed(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_student_saved_by_transformers_opens_as_before(kind, tmp_path):
    model, _ = rl.sft(dense(kind), EXAMPLES, LESSON, "student")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and not changed(model.state_dict(), again.state_dict())


@WAYS
def test_a_checkpoint_opens_in_transformers_and_writes_the_same_greedy_text(base, kind, tmp_path, ignore_mtp_layers):  # noqa: F811
    ignore_mtp_layers(CONFIG)
    model, _ = train_some(kind, base, tmp_path / "run")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "latest", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    words = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "run" / "latest" / "tokenizer.json"))
    problems = countdown.problems("test", 12, 0)
    ours = rl.rollout(model, problems, 40, generator(), 0.0)
    texts = rl.rollout(theirs.eval(), problems, 40, generator(), 0.0).texts
    assert texts == ours.texts and len(set(texts)) > 6
    assert words(problems[0].prompt)["input_ids"] == WORDS.encode(problems[0].prompt).ids
    assert words.decode(ours.tokens[0, 9 : 9 + ours.lengths[0]], skip_special_tokens=True) == texts[0]
    assert torch.equal(rl.rollout(checkpoint.load(tmp_path / "run"), problems, 40, generator(), 0.0).tokens, ours.tokens)
