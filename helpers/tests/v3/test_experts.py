"""Router, experts, their fast path and the balance loss."""

import math

from helpers.tests.builders import draw, small
from helpers.v3 import MoE, Router, loop_over_experts
from helpers.v3.grouped import (
    combine,
    dispatch,
    grouped_linear,
    run_experts,
    sort_by_expert,
)

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")


# --- router and experts


@torch.no_grad()
def test_the_bias_selects_but_has_no_part_in_the_weights():
    config = small(n_group=1, topk_group=1, routed_scaling_factor=2.0)
    router = draw(config).routers()[0].eval()
    x = torch.randn(1, 20, 24)
    scores = (x[0] @ router.weight.T).sigmoid()
    router.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]))
    weights, index, *_ = router(x)
    assert torch.equal(index.sort(dim=-1).values, torch.arange(3).expand(20, 3))
    right = scores.gather(1, index)
    assert torch.allclose(
        weights, 2.0 * right / right.sum(dim=-1, keepdim=True), atol=1e-6
    )


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@torch.no_grad()
def test_only_the_best_groups_are_chosen_from(scoring_func):
    config = small(n_routed_experts=12, scoring_func=scoring_func)
    router = draw(config).routers()[0].eval()
    x = torch.randn(1, 50, 24)
    logits = x[0] @ router.weight.T
    scores = (
        logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)
    ) + router.e_score_correction_bias
    limited = 0
    for row, chosen in zip(scores.tolist(), router(x)[1].tolist(), strict=True):
        groups = [sorted(row[g * 3 : g * 3 + 3])[-2:] for g in range(4)]
        best = sorted(range(4), key=lambda g: sum(groups[g]))[-2:]
        allowed = [e for e in range(12) if e // 3 in best]
        assert set(chosen) == set(sorted(allowed, key=row.__getitem__)[-3:])
        limited += set(chosen) != set(sorted(range(12), key=row.__getitem__)[-3:])
    assert limited > 0


def test_update_bias_moves_by_the_sign_of_the_load_error():
    router = Router(small(n_routed_experts=4, n_group=1, topk_group=1))
    router.update_bias(torch.tensor([10.0, 0, 5, 5]), 0.01)
    expected = torch.tensor([-0.01, 0.01, 0, 0])
    assert torch.allclose(router.e_score_correction_bias, expected)


def test_a_routing_counts_each_choice_and_the_router_keeps_nothing():
    router = draw(small()).routers()[0]
    before = {name: value.clone() for name, value in router.state_dict().items()}
    x = torch.randn(2, 5, 24)
    for mode in (True, False):
        routing = router.train(mode)(x)
        assert torch.equal(
            routing.load(), routing.chosen.flatten().bincount(minlength=8)
        )
    after = router.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(router._buffers) == ["e_score_correction_bias"]


def test_what_a_router_returns_does_not_depend_on_the_mode():
    """RL trains in eval mode or train mode: neither may change a gradient."""
    moe = draw(small()).layers[1].mlp
    x = torch.randn(2, 5, 24)
    gradients = []
    for mode in (True, False):
        moe.train(mode).zero_grad()
        moe(x)[0].square().sum().backward()
        gradients.append(moe.gate.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "seq_aux, expected", [(True, (1.5 + 1.0) / 2), (False, 1.5 * 0.625 + 0.5 * 0.375)]
)
def test_balance_loss_by_hand(seq_aux, expected):
    """Two experts, one chosen, affinities 3/4 and 1/4.

    First sequence: f = (2, 0), P = (3/4, 1/4). Second: f = (1, 1), P = (1/2, 1/2).
    """
    config = small(
        hidden_size=1,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        seq_aux=seq_aux,
    )
    router = Router(config)
    router.weight.data = torch.tensor([[1.0], [-1.0]])
    signs = torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]])
    routing = router(math.log(3) * signs)
    assert routing.balance_loss(config).item() == pytest.approx(expected)


def test_a_pool_of_counts_changes_the_balance_loss_of_the_batch_only():
    def doubled(counts):
        return 2 * counts

    x = torch.randn(2, 5, 24)
    for seq_aux, factor in ((True, 1), (False, 2)):
        config = small(seq_aux=seq_aux)
        routing = draw(config).routers()[0](x)
        alone = routing.balance_loss(config)
        pooled = routing.balance_loss(config, doubled)
        assert torch.allclose(pooled, factor * alone)


def plain_experts(moe, x):
    """The mixture token by token and expert by expert."""
    gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
    rows = x.flatten(0, -2)
    weights, index, *_ = moe.gate(x)
    out = []
    for n, row in enumerate(rows):
        y = moe.shared_experts(row)
        for w, e in zip(weights[n], index[n].tolist(), strict=True):
            gate, up = (gate_up[e] @ row).chunk(2)
            y = y + w * (down[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    "hidden_size, moe_intermediate_size", [(24, 12), (24, 7), (21, 12), (21, 7)]
)
def test_moe_output_and_gradients_equal_the_double_loop(
    hidden_size, moe_intermediate_size
):
    config = small(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size)
    torch.manual_seed(2)
    moe = MoE(config)
    for p in moe.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    moe.gate.e_score_correction_bias[5] = -10.0  # never chosen
    x, up = torch.randn(2, 2, 9, hidden_size)
    results = []
    for forward in (lambda rows: moe(rows)[0], lambda rows: plain_experts(moe, rows)):
        moe.zero_grad()
        rows = x.clone().requires_grad_()
        out = forward(rows)
        out.backward(up)
        results.append([out, rows.grad, *(p.grad.clone() for p in moe.parameters())])
    for fast, plain in zip(*results, strict=True):
        assert torch.allclose(fast, plain, atol=1e-5)
    chosen = moe.gate(x).chosen.unique().tolist()
    assert 5 not in chosen and len(chosen) > 4
    for grad in results[0][3:5]:  # gate_up_proj and down_proj
        assert (
            grad.isfinite().all()
            and grad.abs().amax(dim=(1, 2)).nonzero().flatten().tolist() == chosen
        )


@torch.no_grad()
def test_one_token_without_gradient_takes_the_short_way_to_the_same_numbers():
    moe = draw(small()).layers[1].mlp
    x = torch.randn(1, 1, 24)
    assert torch.allclose(moe(x)[0], moe(x.expand(1, 2, 24))[0][:, :1], atol=1e-6)


@pytest.mark.parametrize("f", [12, 7])
def test_the_fast_path_is_the_plain_loop_that_readers_see(f):
    config = small(moe_intermediate_size=f)
    moe = draw(config).layers[1].mlp
    tensors = []
    results = []
    routing = moe.gate(torch.randn(2, 9, 24))
    for compute in (loop_over_experts, run_experts):
        torch.manual_seed(4)
        tensors = [
            torch.randn(18, 24),
            routing.weights.detach().clone(),
            moe.experts.gate_up_proj.detach().clone(),
            moe.experts.down_proj.detach().clone(),
        ]
        x, weights, gate_up, down = (t.requires_grad_() for t in tensors)
        out = compute(x, weights, routing.chosen, gate_up, down)
        out.backward(torch.randn(18, 24))
        results.append([out, *(t.grad for t in tensors)])
    for plain, fast in zip(*results, strict=True):
        assert torch.allclose(plain, fast, atol=1e-5)


def test_saved_tensor_hooks_and_version_checks_see_what_dispatch_keeps():
    """What a backward pass needs must go through `save_for_backward`."""
    moe = draw(small()).layers[1].mlp
    to = sort_by_expert(moe.gate(torch.randn(1, 6, 24)).chosen, 8)
    packed = []

    def pack(tensor):
        packed.append(tensor.data_ptr())
        return tensor

    x = torch.randn(6, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        combine(dispatch(x, to), to)
    assert {to.order.data_ptr(), to.place.data_ptr()} <= set(packed)
    out = dispatch(x, to)
    to.place.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("width", [8, 6])
def test_grouped_linear_equals_a_loop_also_with_empty_experts(width):
    x, weight = torch.randn(10, width), torch.randn(5, 4, width)
    ends = torch.tensor([0, 3, 3, 10, 10], dtype=torch.int32)
    right = torch.cat((x[:3] @ weight[1].T, x[3:] @ weight[3].T))
    assert torch.allclose(grouped_linear(x, weight, ends), right, atol=1e-5)
