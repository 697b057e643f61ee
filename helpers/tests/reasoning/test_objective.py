"""The formulas of GRPO, beside those of the paper and at their borders."""

import itertools
import math

from helpers.reasoning.countdown import Problem
from helpers.reasoning.grpo import GRPO, reward
from helpers.reasoning.objective import advantages, grpo_loss, row_weights
from helpers.tests.reasoning.small_models import generator

import pytest
import torch

# weights of format, language consistency and a readable last line in notebooks 08 to 10
WEIGHTS_IN_USE = [
    (0.2, 0.0, 0.0),
    (0.2, 1.0, 0.0),
    (0.2, 1.0, 0.5),
    (0.2, 0.25, 0.0),
    (0.2, 3.0, 0.0),
    (0.0, 0.0, 0.0),
]
WORDS_SPOKEN = 30  # of a chain of thought: shares with a denominator up to this


# ------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 4], [1, 1, 1, 1]])
    root = 3**0.5
    by_hand = torch.tensor(
        [[1.0, -1, -1, 1], [-1 / root, -1 / root, -1 / root, root], [0, 0, 0, 0]]
    )
    assert torch.allclose(advantages(rewards), by_hand, atol=1e-5)

    by_hand = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-1, -1, -1, 3], [0, 0, 0, 0]])
    assert torch.equal(advantages(rewards, divide_by_std=False), by_hand)


def test_neither_scale_nor_shift_of_the_rewards_matters():
    rewards = torch.rand(50, 8, generator=generator())
    found = advantages(rewards)
    assert found.mean(dim=1).abs().max() < 1e-5
    assert (found.std(dim=1, correction=0) - 1).abs().max() < 1e-4
    assert torch.allclose(found, advantages(3 * rewards + 2), atol=1e-4)


def reachable_rewards():
    """Every sum of rewards that the weights in use can reach."""
    shares = {a / b for b in range(1, WORDS_SPOKEN + 1) for a in range(b + 1)}
    yes_no = (0.0, 1.0)
    sums = set()
    for weights in WEIGHTS_IN_USE:
        for right, form, line in itertools.product(yes_no, repeat=3):
            for share in shares:
                terms = (right, weights[0] * form, weights[1] * share)
                sums.add(sum(terms) + weights[2] * line)
    return torch.tensor(sorted(sums), dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_group_that_agrees_has_no_advantage_whatever_it_was_paid(
    dtype, divide_by_std
):
    """float32's mean of eight rewards of 1.2 is not 1.2: there was a push of 0.107."""
    rewards = reachable_rewards().to(dtype)
    assert len(rewards) > 2000
    for group in range(2, 65):
        alike = rewards[:, None].expand(-1, group)
        found = advantages(alike, divide_by_std)
        assert found.dtype == dtype
        assert (found == 0.0).all(), group


@pytest.mark.parametrize("value", [1.2, 0.2, 2.7, 1.1, 1e3 + 0.1, -0.3])
def test_a_group_that_agrees_stays_apart_from_one_that_does_not(value):
    rewards = torch.tensor([[value] * 8, [value] * 7 + [value + 0.5]])
    found = advantages(rewards)
    assert found[0].tolist() == [0.0] * 8
    assert (found[1, :7] < 0).all()
    assert found[1, 7] > 1


def test_rewards_that_are_no_numbers_are_not_taken_for_agreement():
    found = advantages(torch.tensor([[math.nan, math.nan]]))
    assert found.isnan().all()


def test_rewards_that_are_equal_by_the_rules_are_equal_numbers():
    """Other words at the same share of English, and so the same reward to the bit."""
    asked = Problem((2, 6, 9, 1), 21)
    settings = GRPO(weight_language=1.0, weight_readable=0.5)
    answer = "</think> <answer> 2 * 6 + 9 * 1 </answer> check 21 right"
    texts = [
        f"<think> try try mal {answer}",
        f"<think> {'wait ' * 4}{'bien ' * 2}{answer}",
        f"<think> {'check ' * 6}{'espera ' * 3}{answer}",
    ]
    rewards = torch.tensor([[reward(settings, asked, text) for text in texts]])
    assert 2.3 < rewards.mean() < 2.4
    assert advantages(rewards).tolist() == [[0.0] * 3]


# ---------------------------------------------------------------------------- weights


def test_row_weights_are_those_of_the_textbooks():
    lengths = torch.tensor([2, 8, 10])
    # every answer a third
    thirds = torch.tensor([1 / 6, 1 / 24, 1 / 30])
    assert torch.allclose(row_weights(lengths, "sequence", 40), thirds)
    # every token of the batch a twentieth
    twentieths = torch.full((3,), 1 / 20)
    assert torch.allclose(row_weights(lengths, "token", 40), twentieths)
    # by no length that the model chose
    constant = torch.full((3,), 1 / 120)
    assert torch.allclose(row_weights(lengths, "constant", 40), constant)
    for level in ("sequence", "token"):
        total = (row_weights(lengths, level, 40) * lengths).sum().item()
        assert total == pytest.approx(1)


# ------------------------------------------------------------------------------- loss


def token_weight(level, lengths, i, longest):
    if level == "sequence":
        return 1 / len(lengths) / lengths[i]
    if level == "token":
        return 1 / sum(lengths)
    return 1 / len(lengths) / longest


def one_token(log_prob, old, advantage, clip):
    """The clipped gain of one token, its slope, and which branch was taken."""
    ratio = math.exp(log_prob - old)
    kept = max(1 - clip, min(1 + clip, ratio)) * advantage
    if ratio * advantage > kept:
        return kept, 0.0, "clipped above" if ratio > 1 else "clipped below"
    within = 1 - clip <= ratio <= 1 + clip
    branch = "inside" if within else "outside, and pulled back"
    return ratio * advantage, ratio * advantage, branch


def by_tokens(case, level, longest, clip, kl):
    """GRPO's loss and its derivative by each log-probability, in Python's float64.

    One token at a time. -> loss, gradient, the branches taken.
    """
    log_probs, old, advantage, lengths, reference = case
    loss = 0.0
    gradient = [[0.0] * len(log_probs[0]) for _ in lengths]
    taken = set()
    for i in range(len(lengths)):
        for t in range(lengths[i]):
            gain, slope, branch = one_token(
                log_probs[i][t], old[i][t], advantage[i], clip
            )
            taken.add(branch)
            if reference is not None:
                d = reference[i][t] - log_probs[i][t]
                gain -= kl * (math.exp(d) - d - 1)
                slope -= kl * (1 - math.exp(d))
            weight = token_weight(level, lengths, i, longest)
            loss -= weight * gain
            gradient[i][t] = -weight * slope
    return loss, gradient, taken


@pytest.mark.parametrize("level", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradient_are_those_of_a_loop_over_tokens(level, kl, dtype):
    branches = set()
    B = 7
    n = 9
    longest = 12
    # row_weights are float32
    close = 2e-5 if dtype == torch.float32 else 1e-7
    for seed in range(8):
        g = generator(seed)
        lengths = torch.randint(1, n + 1, (B,), generator=g)
        lengths[0] = n
        old = -3 * torch.rand(B, n, generator=g, dtype=dtype)
        moved = 0.4 * torch.randn(B, n, generator=g, dtype=dtype)
        log_probs = (old + moved).requires_grad_()
        reference = None
        if kl:
            reference = old + 0.5 * torch.randn(B, n, generator=g, dtype=dtype)
        advantage = torch.randn(B, generator=g, dtype=dtype)
        inside = torch.arange(n) < lengths[:, None]
        weights = row_weights(lengths, level, longest)[:, None].to(dtype) * inside

        loss = grpo_loss(log_probs, old, advantage, weights, 0.2, kl, reference)
        loss.backward()

        case = [x.tolist() for x in (log_probs, old, advantage, lengths)]
        case.append(reference.tolist() if kl else None)
        by_hand, gradient, taken = by_tokens(case, level, longest, 0.2, kl)
        branches |= taken
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(by_hand, rel=close, abs=close)
        expected = torch.tensor(gradient, dtype=dtype)
        assert torch.allclose(log_probs.grad, expected, atol=close)
        assert (log_probs.grad[~inside] == 0).all()
        assert log_probs.grad[inside].abs().sum() > 0
    assert branches == {
        "inside",
        "outside, and pulled back",
        "clipped above",
        "clipped below",
    }


def test_four_answers_by_hand():
    """Two tokens each, the ratio of one token of each row moved; clip 0.2."""
    ratio = torch.tensor([[1.0, 1.5], [1.0, 0.5], [1.0, 1.5], [1.0, 0.5]])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    weights = row_weights(torch.full((4,), 2), "sequence", 2)[:, None].expand(4, 2)
    same = torch.zeros(4, 2)
    gains = [1 + 1.2, 1 + 0.5, -1 - 1.5, -1 - 0.8]
    loss = grpo_loss(ratio.log(), same, advantage, weights, 0.2)
    assert loss.item() == pytest.approx(-sum(gains) / 8, rel=1e-6)

    # the advantages add up to 0, so the loss starts there
    assert grpo_loss(same, same, advantage, weights, 0.2).item() == pytest.approx(0)

    # the estimate of the divergence where the reference says 0.1 more
    k3 = 0.5 * (math.exp(0.1) - 0.1 - 1)
    loss = grpo_loss(same, same, advantage, weights, 0.2, 0.5, same + 0.1)
    assert loss.item() == pytest.approx(k3, rel=1e-3)


def test_the_case_of_the_review_is_a_number():
    loss = grpo_loss(
        torch.tensor([[-1.0, -200.0]]),
        torch.tensor([[-1.0, -200.0]]),
        torch.tensor([1.0]),
        torch.tensor([[1.0, 0.0]]),
        0.2,
        0.001,
        torch.tensor([[-1.0, -1.0]]),
    )
    assert loss.item() == -1


ANYTHING = [math.inf, -math.inf, math.nan, -1e30, 1e30, -200.0, 0.0]


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("where", ["log_probs", "old", "reference", "all"])
def test_padding_may_hold_anything_and_changes_neither_value_nor_gradient(where, kl):
    g = generator(3)
    clean = {
        "log_probs": -torch.rand(3, 4, generator=g),
        "old": -torch.rand(3, 4, generator=g),
        "reference": -torch.rand(3, 4, generator=g),
    }
    advantage = torch.tensor([1.0, -0.5, 2.0])
    weights = torch.tensor([[0.3, 0.2, 0.1, 0.4], [0.5] * 4, [0.1] * 4])

    def loss_and_gradient(case, weights):
        leaf = case["log_probs"].clone().requires_grad_()
        loss = grpo_loss(
            leaf, case["old"], advantage, weights, 0.2, kl, case["reference"]
        )
        loss.backward()
        return loss.item(), leaf.grad

    loss, gradient = loss_and_gradient(clean, weights)
    padded_weights = torch.nn.functional.pad(weights, (0, 2))
    for first, second in itertools.product(ANYTHING, repeat=2):
        padding = torch.tensor([[first, second]]).expand(3, 2)
        plain = torch.zeros(3, 2)
        padded = {}
        for name, tensor in clean.items():
            filling = padding if where in (name, "all") else plain
            padded[name] = torch.cat((tensor, filling), dim=1)
        found, found_gradient = loss_and_gradient(padded, padded_weights)
        assert found == pytest.approx(loss, rel=1e-6)
        assert torch.allclose(found_gradient[:, :4], gradient, rtol=1e-6)
        assert (found_gradient[:, 4:] == 0).all()


def test_k3_measures_one_divergence_and_descends_along_the_other():
    """Over all tokens of one draw, weighted by how often the policy draws them."""
    policy_logits = torch.randn(12, generator=generator(1), dtype=torch.float64)
    reference = torch.randn(12, generator=generator(2), dtype=torch.float64)
    reference = reference.log_softmax(dim=0)

    def divergences(logits):
        policy = logits.log_softmax(dim=0)
        forward = (policy.exp() * (policy - reference)).sum()
        backward = (reference.exp() * (reference - policy)).sum()
        return forward, backward

    leaf = policy_logits.clone().requires_grad_()
    log_probs = leaf.log_softmax(dim=0)[:, None]
    drawn = log_probs.detach()
    nothing_gained = torch.zeros(12, dtype=torch.float64)
    loss = grpo_loss(
        log_probs, drawn, nothing_gained, drawn.exp(), 0.2, 1.0, reference[:, None]
    )
    [gradient] = torch.autograd.grad(loss, leaf)

    other = policy_logits.clone().requires_grad_()
    forward, backward = divergences(other)
    assert loss.item() == pytest.approx(forward.item(), rel=1e-9)
    [of_backward] = torch.autograd.grad(backward, other, retain_graph=True)
    [of_forward] = torch.autograd.grad(forward, other)
    assert torch.allclose(gradient, of_backward)
    assert (gradient - of_forward).abs().max() > 0.05
