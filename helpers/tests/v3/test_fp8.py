"""FP8: the codes of the formats, scales by block, products, models, files."""

import copy
import json
import math
from dataclasses import replace

from helpers.tests.builders import draw, ids, small, write_texts
from helpers.training import corpus as text
from helpers.training import pretrain
from helpers.v3 import DeepSeekV3, V3Config, checkpoint, generate
from helpers.v3.checkpoint import CheckpointError
from helpers.v3.fp8 import (
    FORMATS,
    Recipe,
    RoundedLinear,
    Rounding,
    cast,
    convert,
    dequantise,
    quantise,
    recipe_of,
)
from helpers.v3.grouped import PLAIN_PRODUCTS, grouped_linear
from helpers.v3.state_dict import IN_FP8, published

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")

BLOCKS = [(1, 128), (128, 1), (128, 128), (1, None), (None, 1), (None, None), (2, 3)]
PER_TENSOR, BF16, FLOAT32 = (
    Recipe(*[r] * 5)
    for r in (Rounding((None, None)), Rounding(fmt="bf16"), Rounding(fmt="float32"))
)


# --- formats


def values_of(fmt):
    """All values of a format from 0 up, by its definition.

    Exponent field, mantissa field, subnormals below; the largest is its own check.
    """
    _, largest, bits, smallest = FORMATS[fmt]
    fields = {"e4m3": 4, "e5m2": 5, "e5m6": 5}[fmt]
    bias = 2 ** (fields - 1) - 1
    found = []
    for exponent in range(
        2**fields - (fmt != "e4m3")
    ):  # e4m3fn has no infinities: its top exponent holds values but for one NaN
        for mantissa in range(2**bits):
            scale = 2.0 ** (max(exponent, 1) - bias - bits)
            found.append((mantissa + (2**bits if exponent else 0)) * scale)
    found = found[:-1] if fmt == "e4m3" else found
    assert found[-1] == largest and found[2**bits] == 2.0**smallest
    return found


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_all_256_codes_are_what_the_format_says_and_stay_when_cast_again(fmt):
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(FORMATS[fmt][0]).float()
    finite = values.isfinite()
    positive = values[: int(finite[:128].sum())]
    assert positive.tolist() == values_of(fmt) and torch.equal(
        values[128:][finite[128:]], -positive
    )
    assert torch.equal(
        cast(values[finite], fmt).view(torch.uint8), codes[finite]
    )  # -0 too
    assert cast(values[values.isnan()], fmt).float().isnan().all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_cast_takes_the_nearest_value_ties_to_even_and_saturates(fmt):
    grid = torch.tensor(values_of(fmt), dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    even = torch.where(torch.arange(len(middle)) % 2 == 0, grid[:-1], grid[1:])
    for sign in (1, -1):
        assert torch.equal(cast(sign * grid.float(), fmt).double(), sign * grid)
        assert torch.equal(cast(sign * middle.float(), fmt).double(), sign * even)
        below, above = (
            torch.nextafter(middle.float(), torch.tensor(t)) for t in (0.0, math.inf)
        )
        assert torch.equal(
            cast(sign * below, fmt).double(), sign * grid[:-1]
        ) and torch.equal(cast(sign * above, fmt).double(), sign * grid[1:])
        largest = FORMATS[fmt][1]
        assert (
            cast(torch.tensor([1.02, 1e6, math.inf]) * sign * largest, fmt)
            .float()
            .tolist()
            == [sign * largest] * 3
        )
    assert cast(torch.tensor([math.nan, -math.nan]), fmt).float().isnan().all()
    assert (
        cast(torch.tensor([2147483647], dtype=torch.int32).view(torch.float32), fmt)
        .float()
        .isnan()
    )


def test_arithmetic_rounding_agrees_with_torch_where_torch_has_the_format(monkeypatch):
    x = torch.randn(20_000) * 10.0 ** torch.randint(-9, 6, (20_000,))
    for fmt in ("e4m3", "e5m2"):
        monkeypatch.setitem(FORMATS, "by hand", (None, *FORMATS[fmt][1:]))
        assert torch.equal(cast(x, "by hand"), cast(x, fmt).float())


# --- scales


def by_hand(x, block, fmt, pow2=False):
    """Each block in turn: (x rounded, scales).

    In float64 but for the division, which is float32 as in the module.
    """
    R, C = x.shape
    r, c = block[0] or max(R, 1), block[1] or max(C, 1)
    out, scales = torch.zeros(R, C), torch.zeros(-(-R // r), -(-C // c))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = x[i * r : (i + 1) * r, j * c : (j + 1) * c]
            scale = part.abs().max().clamp(min=1e-12) / FORMATS[fmt][1]
            scale = (
                2.0 ** torch.tensor(float(scale)).double().log2().ceil().float()
                if pow2
                else scale
            )
            out[i * r : (i + 1) * r, j * c : (j + 1) * c] = (
                cast(part / scale, fmt).float() * scale
            )
            scales[i, j] = scale
    return out, scales


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(3, 5), (130, 1), (1, 300), (128, 256), (200, 257), (0, 4), (4, 0)]
)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_those_of_a_loop_also_ragged_and_empty_ones(shape, block):
    x = torch.randn(shape) * 10.0 ** torch.randint(-4, 5, shape)
    for fmt, pow2 in (("e4m3", False), ("e5m6", True)):
        codes, scale = quantise(x, block, fmt, pow2)
        out, scales = by_hand(x, block, fmt, pow2)
        assert (
            codes.shape == x.shape
            and torch.equal(scale, scales)
            and torch.equal(dequantise(codes, scale, block), out)
        )


def test_576_rows_have_five_rows_of_scales_and_stacks_are_rounded_one_by_one():
    x = torch.randn(576, 300)
    codes, scale = quantise(x, (128, 128))
    assert (
        scale.shape == (5, 3)
        and scale[4, 2] == x[512:, 256:].abs().max() / 448
        and codes.dtype == torch.float8_e4m3fn
    )
    stack = torch.randn(3, 2, 130, 140)
    for block in BLOCKS:
        whole = Rounding(block)(stack)
        assert all(
            torch.equal(whole[i, j], Rounding(block)(stack[i, j]))
            for i in range(3)
            for j in range(2)
        )


numbers = st.floats(-(2.0**127), 2.0**127, width=32)
tensors = st.integers(1, 9).flatmap(
    lambda columns: st.lists(
        st.lists(numbers, min_size=columns, max_size=columns), min_size=1, max_size=9
    )
)


@pytest.mark.slow
@given(
    tensors,
    st.sampled_from([*BLOCKS, (3, 2), (1, 4)]),
    st.sampled_from(sorted(FORMATS)),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_the_error_is_at_most_half_a_step_whatever_the_numbers(rows, block, fmt, pow2):
    x = torch.tensor(rows)
    codes, scale = quantise(x, block, fmt, pow2)
    out = dequantise(codes, scale, block).double()
    _, largest, bits, smallest = FORMATS[fmt]
    spread = dequantise(
        torch.ones_like(x), scale, block
    ).double()  # the scale of each number
    bound = (
        torch.maximum(
            x.double().abs() * 2.0 ** -(bits + 1), spread * 2.0 ** (smallest - bits - 1)
        )
        * (1 + 1e-6)
        + 1e-45
    )
    assert ((out - x.double()).abs() <= bound).all()
    assert (out[x == 0] == 0).all() and (out * x.double() >= 0).all()
    if pow2:
        assert (torch.frexp(scale).mantissa == 0.5).all()
        plain = quantise(x, block, fmt)[1]
        assert ((plain <= scale) & (scale < 2 * plain)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "fmt, pow2", [("e4m3", False), ("e4m3", True), ("e5m2", False), ("e5m6", True)]
)
def test_what_is_not_finite_spoils_its_block_and_no_other(bad, fmt, pow2):
    x = torch.randn(4, 256)
    x[2, 130] = bad
    out = Rounding((1, 128), fmt, pow2)(x)
    assert out[2, 128:].isnan().all() and out.isnan().sum() == 128


def test_subnormal_and_tiny_blocks_and_the_upper_bound():
    x = torch.tensor(
        [
            [0.0, -0.0, 1e-45, 1e-20],
            [1e-13, 5e-13, 1e-12, 2e-12],
            [1.0, 448.0, 1200.0, 5000.0],
        ]
    )
    codes, scale = quantise(x, (1, None), high=1200.0)
    assert scale.flatten().tolist() == pytest.approx(
        [1e-12 / 448, 2e-12 / 448, 1200 / 448]
    )
    out = dequantise(codes, scale, (1, None))
    assert (
        (out[0] == 0).all()
        and out[1, 3] == pytest.approx(2e-12)
        and out[2, 2:].tolist() == pytest.approx([1200.0, 1200.0])
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cast(torch.ones(2), "e3m4"), "fmt='e3m4'"),
        (lambda: quantise(torch.ones(2, 2), (1, 2), "e3m4"), "fmt='e3m4'"),
        (lambda: quantise(torch.ones(2)), "2 or more dimensions"),
        (lambda: quantise(torch.ones(2, 2), (0, 1)), r"block=\(0, 1\)"),
        (lambda: quantise(torch.ones(2, 2), (1, 2.0)), "whole numbers"),
        (lambda: quantise(torch.ones(2, 2), (1,)), "two whole numbers"),
        (
            lambda: dequantise(torch.ones(576, 4), torch.ones(4, 1), (128, 128)),
            r"\[5, 1\]",
        ),
    ],
)
def test_bad_input_is_one_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- products


def tiled_product(a, a_scale, b, b_scale, k=128):
    """a @ b.T from codes as the GPU kernel forms it.

    The partial sum of every k columns in float32, times the two scales, added up.
    """
    out = torch.zeros(a.shape[0], b.shape[0])
    rows = [
        s if len(s) == len(t) else s.repeat_interleave(k, dim=0)[: len(t)]
        for t, s in ((a, a_scale), (b, b_scale))
    ]
    for j, (x, y) in enumerate(
        zip(a.float().split(k, 1), b.float().split(k, 1), strict=True)
    ):
        out += (x @ y.T) * rows[0][:, j, None] * rows[1][:, j]
    return out


def close(a, b, tolerance=3e-6):
    assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("N, K, M", [(256, 384, 256), (131, 200, 65)])
def test_the_fast_path_equals_partial_sums_of_128_in_all_three_products(N, K, M):
    x, w, g = (
        torch.randn(N, K).requires_grad_(),
        (torch.randn(M, K) / 16).requires_grad_(),
        torch.randn(N, M) * 1e-3,
    )
    y = Recipe().linear(x, w)
    y.backward(g)
    (xq, xs), (wq, ws) = (
        quantise(x.detach(), (1, 128)),
        quantise(w.detach(), (128, 128)),
    )
    close(y, tiled_product(xq, xs, wq, ws))
    gq, gs = quantise(g, (1, 128))
    close(x.grad, tiled_product(gq, gs, wq.T, ws.T))
    again, again_s = quantise(dequantise(xq, xs), (128, 1))
    gq, gs = quantise(g, (128, 1))
    close(w.grad, tiled_product(gq.T, gs.T, again.T, again_s.T))


VARIANTS = {
    "V3": Recipe(),
    "o_proj": Recipe().after_attention(),
    "pow2": Recipe().pow2("x", "g"),
    "per tensor": PER_TENSOR,
    "bf16": BF16,
    "float32": FLOAT32,
    "block-wise Dgrad": Recipe(g=Rounding((128, 128))),
    "E5M2": Recipe(g=Rounding((1, 128), "e5m2")),
}


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_are_those_of_float64_with_the_rounded_operands(recipe):
    x, w, g = (
        torch.randn(3, 50, 200).requires_grad_(),
        torch.randn(70, 200).requires_grad_(),
        torch.randn(3, 50, 70),
    )
    y = recipe.linear(x, w)
    y.backward(g)
    flat_x, flat_g = x.detach().flatten(0, 1), g.flatten(0, 1)
    seen = recipe.x(flat_x)
    kept = recipe.cache(flat_x) if recipe.cache else seen
    close(y.flatten(0, 1), seen.double() @ recipe.w(w.detach()).double().T)
    close(
        x.grad.flatten(0, 1), recipe.g(flat_g).double() @ recipe.w(w.detach()).double()
    )
    close(w.grad, recipe.g_back(flat_g).double().T @ recipe.x_back(kept).double())
    exact = flat_x.double() @ w.detach().double().T
    error = ((y.detach().flatten(0, 1).double() - exact).norm() / exact.norm()).item()
    assert (1e-2 < error < 6e-2) if recipe.w.fmt == "e4m3" else error < 6e-3


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("width", [64, 37])
def test_grouped_is_a_loop_over_experts_also_with_none_or_many_tokens(recipe, width):
    recipe = (
        replace(
            recipe,
            **{
                n: replace(getattr(recipe, n), block=(1, 128))
                for n in ("x", "g", "x_back", "g_back")
            },
        )
        if recipe is PER_TENSOR
        else recipe
    )  # its one scale spans all experts
    counts = [0, 5, 300, 0, 128, 1]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    x, w, g = (
        torch.randn(sum(counts), 96),
        torch.randn(len(counts), width, 96),
        torch.randn(sum(counts), width),
    )
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = recipe.linear(a, b, ends)
    y.backward(g)
    c, d = x.clone().requires_grad_(), w.clone().requires_grad_()
    z = torch.cat([recipe.linear(rows, d[e]) for e, rows in enumerate(c.split(counts))])
    z.backward(g)
    for ours, loop in ((y, z), (a.grad, c.grad), (b.grad, d.grad)):
        close(ours, loop)
    assert (b.grad[[0, 3]] == 0).all()
    if recipe is FLOAT32:
        close(y, grouped_linear(x, w, ends))


def test_a_scale_per_tensor_spans_all_tokens_of_all_experts():
    ends = torch.tensor([2, 4], dtype=torch.int32)
    x, w = (
        torch.randn(4, 64) * torch.tensor([1.0, 1.0, 1e6, 1e6])[:, None],
        torch.randn(2, 8, 64),
    )
    close(
        PER_TENSOR.linear(x, w, ends),
        torch.cat(
            [
                PER_TENSOR.x(x)[:2] @ PER_TENSOR.w(w[0]).T,
                PER_TENSOR.x(x)[2:] @ PER_TENSOR.w(w[1]).T,
            ]
        ),
    )


# --- model and training


def logits_and_gradients(model, tokens):
    model.train()
    main, mtp, *_ = pretrain.losses(model, tokens)
    (main + mtp).backward()
    return main.item(), {name: p.grad for name, p in model.named_parameters()}


def build(recipe, config=None, seed=0):
    torch.manual_seed(seed)
    model = DeepSeekV3(config or small())
    return model if recipe is None else convert(model, recipe)


def test_the_rounded_layers_are_the_ones_that_the_published_files_have_in_fp8():
    model = build(Recipe())
    rounded = set()
    for name, module in model.named_modules():
        products = getattr(module, "products", PLAIN_PRODUCTS)
        if isinstance(module, RoundedLinear) or products is not PLAIN_PRODUCTS:
            rounded.add(name)
    names = {
        name.removesuffix(".weight")
        for name, _ in published(model.config, model.state_dict())
        if IN_FP8.fullmatch(name)
    }
    ours = set()
    for name in names:  # published names -> ours
        name = name.removeprefix("model.").replace("layers.3.", "mtp.0.block.")
        ours.add(
            name.split(".experts.")[0] + ".experts" if ".experts." in name else name
        )
    assert rounded == ours
    # attention of 3 layers and MTP; the dense MLP; the MoEs: experts and shared
    assert len(rounded) == 4 * 5 + 3 + 3 * 4
    for kept in ("lm_head", "mtp.0.eh_proj", "layers.1.mlp.gate"):
        assert kept not in rounded
    attention = model.layers[0].self_attn
    assert attention.o_proj.recipe.cache.fmt == "e5m6"
    assert attention.kv_b_proj.recipe.cache is None
    assert recipe_of(model) == Recipe() and recipe_of(build(None)) is None


def test_converting_keeps_the_parameters_their_names_and_their_order():
    plain = build(None)
    before = dict(plain.named_parameters())
    model = convert(plain, Recipe())
    after = dict(model.named_parameters())
    assert model is plain and list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert copy.deepcopy(model)(ids(small(), 1, 4)).equal(model(ids(small(), 1, 4)))


def test_without_a_recipe_and_with_float32_everything_is_the_same():
    tokens = ids(small(), 2, 10)
    plain, same = build(None), build(FLOAT32)
    assert all(
        torch.equal(p, q)
        for p, q in zip(plain.parameters(), same.parameters(), strict=True)
    )
    with torch.no_grad():
        assert torch.allclose(plain(tokens), same(tokens), atol=1e-6)
    (a, ga), (b, gb) = (
        logits_and_gradients(plain, tokens),
        logits_and_gradients(same, tokens),
    )
    assert a == pytest.approx(b, rel=1e-6) and ga.keys() == gb.keys()
    for name in ga:
        assert torch.allclose(ga[name], gb[name], atol=1e-6, rtol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [Recipe(), PER_TENSOR, BF16], ids=["V3", "per tensor", "bf16"]
)
def test_a_rounded_model_differs_a_little_and_every_weight_has_a_gradient(recipe):
    tokens = ids(small(), 2, 40)
    plain, rounded = (
        build(None, small(topk_group=4, num_experts_per_tok=8)),
        build(recipe, small(topk_group=4, num_experts_per_tok=8)),
    )
    (a, ga), (b, gb) = (
        logits_and_gradients(plain, tokens),
        logits_and_gradients(rounded, tokens),
    )
    assert 0 < abs(a - b) < 0.02 * a
    for name, g in ga.items():
        error = (g - gb[name]).norm() / g.norm()
        assert 0 < error < (0.05 if recipe is BF16 else 0.5), (name, error)


def test_decoding_from_the_latent_cache_sees_the_rounded_weights():
    recipe = replace(FLOAT32, w=Rounding((128, 128)))
    model, tokens = build(recipe).eval(), ids(small(), 2, 12)
    out = generate(model, tokens, 8)
    with torch.no_grad():
        assert torch.equal(model(out)[:, 11:-1].argmax(-1), out[:, 12:])
    alone = tokens[:1]
    with torch.no_grad():
        assert torch.equal(
            generate(model, alone, 1)[0, -1], model(alone)[0, -1].argmax()
        )


CONFIG = small(vocab_size=300, initializer_range=0.05, num_hidden_layers=2)
SETTINGS = pretrain.Settings(
    steps=6, batch_size=2, length=16, warmup_steps=2, valid_every=3, valid_sequences=3
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text.load(write_texts(tmp_path_factory.mktemp("corpus") / "texts"), 300)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [Recipe(), FLOAT32], ids=["V3", "float32"])
def test_moments_are_bf16_and_a_stopped_run_ends_in_the_same_bits(
    corpus, tmp_path, recipe
):
    whole = build(recipe, CONFIG)
    pretrain.train(whole, corpus, SETTINGS, tmp_path / "whole", save_every=2)
    extra, _ = checkpoint.load_training(tmp_path / "whole")
    moments = {
        name: m for name, m in extra.items() if name.endswith(("exp_avg", "exp_avg_sq"))
    }
    assert (
        moments
        and all(torch.equal(m, m.bfloat16().float()) for m in moments.values())
        and any(m.any() for m in moments.values())
    )

    stopped = build(recipe, CONFIG)
    real, calls = pretrain.losses, []

    def losses(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return real(*args)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RuntimeError, match="power cut"),
    ):
        patch.setattr(pretrain, "losses", losses)
        pretrain.train(stopped, corpus, SETTINGS, tmp_path / "stopped", save_every=2)
    resumed = build(recipe, CONFIG, seed=5)
    pretrain.train(resumed, corpus, SETTINGS, tmp_path / "stopped", save_every=2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.state_dict().values(), resumed.state_dict().values(), strict=True
        )
    )
    with pytest.raises(ValueError, match="another precision"):
        pretrain.train(build(BF16, CONFIG), corpus, SETTINGS, tmp_path / "stopped")
    with pytest.raises(ValueError, match="another precision"):
        pretrain.train(build(None, CONFIG), corpus, SETTINGS, tmp_path / "stopped")


@pytest.mark.slow
def test_run_keeps_each_precision_in_a_folder_of_its_own(corpus, lab_home):
    short = replace(SETTINGS, steps=1, seed=11)
    found = [
        pretrain.run(CONFIG, corpus, short, "fp8 folders", precision)[1]["loss"]
        for precision in (None, Recipe(), PER_TENSOR)
    ]
    assert (
        len(list((lab_home / ".lab").glob("fp8-folders-*"))) == 3
        and len({loss[0] for loss in found}) == 3
    )
    assert (
        pretrain.run(CONFIG, corpus, short, "fp8 folders", Recipe())[1]["loss"]
        == found[1]
    )


# --- files

KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


def tiny(**changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
    }
    return V3Config.tiny(**(sizes | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [small(), tiny(kv_lora_rank=96, qk_rope_head_dim=34, moe_intermediate_size=130)],
    ids=["small", "ragged"],
)
def test_an_fp8_checkpoint_has_the_published_form_and_loads_as_the_rounded_weights(
    config, tmp_path
):
    model = draw(config)
    written = checkpoint.save(model, tmp_path, in_fp8=True, shard_bytes=40_000)
    tensors = {
        name: t
        for file in written.glob("model-*")
        for name, t in load_file(file).items()
    }
    written_config = json.loads((written / "config.json").read_text(encoding="utf-8"))
    assert written_config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    codes = {name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    assert {f"{name}_scale_inv" for name in codes} == {
        name for name in tensors if name.endswith("_scale_inv")
    }
    for name in codes:
        scale = tensors[f"{name}_scale_inv"]
        assert scale.dtype == torch.float32 and list(scale.shape) == [
            -(-n // 128) for n in tensors[name].shape
        ]
    assert KV_A in codes and not any(
        "norm" in n
        or "gate.weight" in n
        or "embed" in n
        or "head" in n
        or "eh_proj" in n
        for n in codes
    )
    loaded = checkpoint.load(tmp_path)
    for (name, ours), (_, original) in zip(
        published(loaded.config, loaded.state_dict()),
        published(model.config, model.state_dict()),
        strict=True,
    ):
        assert torch.equal(
            ours, Rounding((128, 128))(original) if name in codes else original
        ), name
    again = checkpoint.load(checkpoint.save(loaded, tmp_path / "again", in_fp8=True))
    for (name, a), (_, b) in zip(
        published(again.config, again.state_dict()),
        published(loaded.config, loaded.state_dict()),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-6, atol=0), (
            name
        )  # what is FP8 already changes no more than by the scale's last bit


def test_a_model_trained_in_fp8_computes_with_the_weights_of_its_file(tmp_path):
    config = tiny()
    model = build(replace(FLOAT32, w=Rounding((128, 128))), config).eval()
    checkpoint.save(model, tmp_path, in_fp8=True)
    tokens = ids(config, 2, 9)
    with torch.no_grad():
        assert torch.allclose(
            model(tokens), checkpoint.load(tmp_path)(tokens), atol=1e-5
        )


@pytest.mark.parametrize("rope", [128, 32], ids=["multiples of 128", "160 rows"])
def test_transformers_reads_our_fp8_files_but_not_where_blocks_are_ragged(
    rope, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available",
        lambda: True,
    )  # asked for, not used
    config = tiny(qk_rope_head_dim=rope)
    model, tokens = draw(config), ids(config, 2, 9)
    model.layers[1].self_attn.kv_a_proj_with_mqa.weight.data[128:] *= (
        8  # the blocks' scales differ
    )
    checkpoint.save(model, tmp_path, in_fp8=True)
    ours = checkpoint.load(tmp_path)
    theirs = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "latest", dtype=torch.float32
    ).eval()
    weight = dict(ours.named_parameters())[KV_A.removeprefix("model.")]
    same = torch.equal(theirs.state_dict()[KV_A], weight)
    with torch.no_grad():
        difference = (ours(tokens) - theirs(tokens).logits).abs().max().item()
    if rope == 128:
        assert same and difference < 1e-4
    else:
        # transformers 5.23 takes 160 rows with 2 rows of scales for blocks of 80;
        # when this fails, it has been repaired
        assert not same and difference > 1e-2


@pytest.fixture
def files(tmp_path):
    return checkpoint.save(draw(small(num_hidden_layers=2)), tmp_path, in_fp8=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{KV_A}_scale_inv"), f"{KV_A}_scale_inv is missing"),
        (
            lambda t: t.update({f"{KV_A}_scale_inv": torch.ones(2, 1)}),
            rf"{KV_A}_scale_inv has shape \[2, 1\].*\[1, 1\]",
        ),
        (
            lambda t: t.update({f"{KV_A}_scale_inv": torch.tensor([[math.nan]])}),
            f"{KV_A}_scale_inv holds a scale",
        ),
        (
            lambda t: t.update({f"{KV_A}_scale_inv": torch.tensor([[math.inf]])}),
            f"{KV_A}_scale_inv holds a scale",
        ),
        (
            lambda t: t.update({f"{KV_A}_scale_inv": torch.zeros(1, 1)}),
            f"{KV_A}_scale_inv holds a scale",
        ),
        (
            lambda t: t.update({f"{KV_A}_scale_inv": -torch.ones(1, 1)}),
            f"{KV_A}_scale_inv holds a scale",
        ),
        (
            lambda t: t.update({f"{KV_A}_scale_inv": torch.ones(1, 1).int()}),
            f"{KV_A}_scale_inv is torch.int32",
        ),
        (
            lambda t: t.update({KV_A: t[KV_A].float()}),
            f"{KV_A} is torch.float32 and {KV_A}_scale_inv is there",
        ),
        (
            lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1)}),
            "model.norm.weight_scale_inv is there",
        ),
        (
            lambda t: t.update({KV_A: t[KV_A].to(torch.float8_e5m2)}),
            f"{KV_A} is torch.float8_e5m2",
        ),
        (
            lambda t: t.update({KV_A: t[KV_A][:3].clone()}),
            rf"{KV_A} has shape \[3, 24\]",
        ),
        (
            lambda t: t.update({"model.more_scale_inv": torch.ones(1, 1)}),
            "model.more_scale_inv is extra",
        ),
    ],
)
def test_a_broken_fp8_file_is_named(files, change, message):
    tensors = load_file(files / "model.safetensors")
    change(tensors)
    (files / "model.safetensors").unlink()
    save_file(tensors, files / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(files)


@pytest.mark.parametrize(
    "asked, message",
    [
        ("absent", "_scale_inv.* is extra"),
        (None, "quantization_config"),
        ([], "quantization_config"),
        (
            {
                "quant_method": "fp8",
                "fmt": "e5m2",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            },
            "'e5m2'.* is not read",
        ),
        ({"quant_method": "gptq"}, "gptq"),
        (
            {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [64, 64],
            },
            "64",
        ),
    ],
)
def test_another_quantisation_is_refused(files, asked, message):
    config = json.loads((files / "config.json").read_text(encoding="utf-8")) | {
        "quantization_config": asked
    }
    if asked == "absent":
        del config["quantization_config"]
    (files / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(files)
