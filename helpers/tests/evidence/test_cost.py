"""FLOPs beside torch's counter, the sources' printed digits, sliders that move."""

import math
from pathlib import Path

from helpers.evidence import cost
from helpers.evidence.facts import FACTS, PEERS, V3_CONFIG, fact
from helpers.v3 import DeepSeekV3, V3Config

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from nbclient import NotebookClient
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

V3 = V3Config.deepseek_v3()
LLAMA = AutoConfig.for_model("llama", **PEERS["Llama 3.1 405B"][1])
MIXTRAL = AutoConfig.for_model("mixtral", **PEERS["Mixtral 8x7B"][1])
MIXTRAL_22B = AutoConfig.for_model("mixtral", **PEERS["Mixtral 8x22B"][1])
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# As published: Qwen2.5-0.5B has 0.49B parameters, its embedding is also its head
QWEN_HALF = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
B = 2
T = 12


def value(key):
    return fact(key).value


def total(config, length, **options):
    return sum(cost.flops_per_token(config, length, **options).values())


def sums(config, **options):
    """Stored and used weights of all components together."""
    parts = cost.weights(config, **options).values()
    return sum(part.stored for part in parts), sum(part.used for part in parts)


def in_billions(config):
    stored, used = sums(config)
    return round(stored / 1e9, 2), round(used / 1e9, 2)


def counted(step):
    """FLOPs of `step()` and its backward pass, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


# ----------------------------------------------------------------------------- FLOPs


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "n_shared_experts": 0},
        {"first_k_dense_replace": 4},
        {"first_k_dense_replace": 9},
    ],
)
def test_flops_of_our_v3_are_what_torch_counts(changes):
    # A width of 37 takes the experts' path without grouped_mm. Values are as wide as
    # keys (48), as narrower ones are padded for the fused kernels.
    config = V3Config.tiny(
        moe_intermediate_size=37, num_nextn_predict_layers=2, v_head_dim=48, **changes
    )
    model = DeepSeekV3(config)
    ids = torch.randint(config.vocab_size, (B, T))
    with sdpa_kernel(SDPBackend.MATH):
        plain = counted(lambda: model(ids).sum())
    assert plain == B * T * total(config, T, seen=1)

    def all_heads():
        hidden = model.hidden(ids)
        main = model.lm_head(model.norm(hidden))
        further, _ = model.predict_further(hidden, ids)
        return sum(logits.sum() for logits in [main, *further])

    with sdpa_kernel(SDPBackend.MATH):
        further = counted(all_heads) - plain
    expected = 0
    for depth in (1, 2):
        seen_there = T - depth  # each depth sees one token fewer
        both = cost.flops_per_token(config, seen_there, seen=1, mtp=True)["MTP"]
        expected += B * seen_there * both / 2
    assert further == expected


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 24}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_flops_of_transformers_models_are_what_torch_counts(kind, changes):
    config = AutoConfig.for_model(kind, **SMALL, **changes)
    plain_loops = {"attn_implementation": "eager"}
    if kind == "mixtral":
        plain_loops["experts_implementation"] = "eager"
    model = AutoModelForCausalLM.from_config(config, **plain_loops)
    ids = torch.randint(config.vocab_size, (B, T))
    measured = counted(lambda: model(ids, use_cache=False).logits.sum())
    assert measured == B * T * total(config, T, seen=1)


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"num_nextn_predict_layers": 0},
        {"first_k_dense_replace": 9},
    ],
)
def test_weights_are_the_models_own(changes):
    config = V3Config.tiny(**changes)
    model = DeepSeekV3(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sums(config, mtp=True)[0] == matrices


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_weights_are_those_of_transformers_model(kind, tied):
    config = AutoConfig.for_model(kind, **SMALL, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sums(config)[0] == matrices


def test_a_tied_head_is_counted_once():
    config = AutoConfig.for_model("qwen2", **QWEN_HALF)
    table = 151936 * 896
    stored, used = sums(config)
    assert round(stored / 1e6, 1) == 494.0
    assert used == stored
    parts = cost.weights(config)
    assert parts["embedding"].stored + parts["head"].stored == table
    # The table is multiplied with once, as the head
    flops = cost.flops_per_token(config, 8)
    assert flops["head"] == 6 * table
    assert "embedding" not in flops


def test_a_component_is_a_pair():
    parts = cost.weights(V3, mtp=True)
    stored, used = parts["routed experts"]
    assert (stored, used) == parts["routed experts"]
    assert list(parts) == [
        "embedding",
        "attention projections",
        "dense FFN",
        "head",
        "shared experts",
        "router",
        "routed experts",
        "MTP",
    ]
    assert "MTP" not in cost.weights(LLAMA, mtp=True)


def test_a_transformers_config_of_v3_gives_the_same_counts():
    left_out = ("quantization_config", "rope_scaling", "rope_theta")
    kwargs = {k: v for k, v in V3_CONFIG.items() if k not in left_out}
    config = AutoConfig.for_model(**kwargs)
    ours = cost.flops_per_token(V3, 4096, mtp=True)
    assert cost.flops_per_token(config, 4096, mtp=True) == ours


def test_printed_parameter_counts():
    assert in_billions(V3) == (671.03, 37.55)
    assert in_billions(LLAMA) == (405.85, 405.85)
    assert in_billions(MIXTRAL) == (46.70, 12.88)
    stored, used = sums(MIXTRAL_22B)
    assert (round(stored / 1e9, 1), round(used / 1e9, 2)) == (140.6, 39.15)


@pytest.mark.parametrize(
    "kind", ["gpt2", "llama4", "gemma3", "mistral3", "mamba", "kimi_k2"]
)
def test_another_kind_of_model_is_refused_by_its_model_type(kind):
    if kind == "kimi_k2":  # not in transformers: any object with such a model_type
        config = AutoConfig.for_model("llama", **SMALL)
        config.model_type = kind
    else:
        config = AutoConfig.for_model(kind)
    for count in (cost.weights, lambda c: cost.flops_per_token(c, 8)):
        with pytest.raises(ValueError) as error:
            count(config)
        assert f"model_type='{kind}' cannot work: give a V3Config" in str(error.value)


@pytest.mark.parametrize("config", [None, 3, "llama", {}, V3_CONFIG, SMALL, V3Config])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match="^model_type=.* cannot work: .*no dict"):
        cost.weights(config)


# ----------------------------------------------------- printed FLOPs, rates and days


def test_printed_flops_and_rates():
    per_token = total(V3, 4096)
    assert round(per_token / 1e9, 1) == value("v3.train_gflops_recomputed") == 250.5
    assert round(total(LLAMA, 4096) / 1e9) == 2473
    assert round(total(LLAMA, 4096, seen=0.25) / 1e9, 1) == 2447.9
    printed = value("v3.train_gflops") * 1e9 * value("v3.tokens")
    v3_rate = cost.rate(printed, value("v3.gpu_hours_pretrain"))
    assert round(v3_rate) == value("v3.tflops_per_gpu_recomputed") == 386
    llama_rate = cost.rate(value("llama405b.flops"), value("llama405b.gpu_hours"))
    assert round(llama_rate) == 342
    square = total(V3, 4096, seen=1) / per_token
    printed_square = value("v3.tflops_noncausal") / value("v3.tflops_per_gpu")
    assert round(square, 2) == round(printed_square, 2)


def test_printed_tokens_per_day_and_hours():
    step_tokens = value("v3.train.batch_end") * value("v3.train.seq_len")
    per_day = step_tokens / value("v3.step_seconds") * 86400
    assert (
        round(per_day / 1e9, 1) == round(value("v3.tokens_per_day") / 1e9, 1) == 272.8
    )
    per_trillion = value("v3.gpus") * 24 * 1e12 / per_day
    assert round(per_trillion, -3) == value("v3.gpu_hours_per_trillion")
    assert round(1e12 / per_day, 1) == value("v3.days_per_trillion")
    hours = value("v3.gpu_hours_per_trillion") * value("v3.tokens") / 1e12
    assert hours == value("v3.gpu_hours_pretrain")
    days = value("v3.gpu_hours_pretrain") / value("v3.gpus") / 24
    assert round(days, 1) == 54.2


def test_mfu_names_its_peak():
    causal = value("v3.tflops_per_gpu")
    square = value("v3.tflops_noncausal")
    near = {"abs": 0.0006}
    assert cost.mfu(causal, "h800", "bf16") == pytest.approx(value("v3.mfu"), **near)
    printed_square = pytest.approx(value("v3.mfu_noncausal"), **near)
    assert cost.mfu(square, "h800", "bf16") == printed_square
    assert round(cost.mfu(causal, "h800", "fp8"), 3) == 0.195
    llama = cost.mfu(value("llama405b.tflops_per_gpu"), "h100", "bf16")
    assert llama == pytest.approx(value("llama405b.mfu"), abs=0.006)


# ----------------------------------------------------------------- hours and dollars


def test_printed_dollars_and_ratios():
    v3_stages = ("pretrain", "context", "post")
    v3 = sum(value(f"v3.gpu_hours_{stage}") for stage in v3_stages)
    r1_stages = ("zero", "sft_data", "r1")
    r1 = sum(value(f"r1.gpu_hours_{stage}") for stage in r1_stages)
    assert v3 == value("v3.gpu_hours")
    assert r1 == value("r1.gpu_hours")
    assert v3 * 2 == value("v3.usd") == 5.576e6
    assert r1 * 2 == value("r1.usd")
    assert (v3 + r1) * 2 == value("r1.usd_with_base") == 5.87e6
    assert round(value("llama405b.gpu_hours") / v3, 1) == 11.1
    article = value("article.gpu_hours_ratio")
    assert round(value("llama31.gpu_hours") / v3, 1) == article


def test_printed_weeks_and_wall_hours():
    rent = value("fleet.a100_rumoured") * 168 * value("fleet.a100_usd_per_hour")
    assert round(rent / 1e6, 2) == 11.34
    assert value("r1.gpus") * value("r1.wall_hours_zero") == 101376
    assert round(value("r1.gpus") * value("r1.wall_hours_r1"), -3) == 41e3
    parts = [value(f"fleet.hopper_{gpu}") for gpu in ("h800", "h100", "h20")]
    assert sum(parts) == value("fleet.hopper")


# ----------------------------------------------------------------------------- input


POSITIVE = st.floats(min_value=1e-9, max_value=1e30)


@pytest.mark.slow
@given(POSITIVE, POSITIVE)
def test_rates_are_linear(flop, tflops):
    hours = flop / (tflops * 1e12) / 3600
    assume(hours >= 1e-9)
    assert cost.rate(flop, hours) == pytest.approx(tflops)
    assert cost.rate(2 * flop, hours) == pytest.approx(2 * tflops)


ODD = [None, "2", True, 1j, 10**400, [1.0], np.nan, np.array([1.0, np.inf])]
ANY = st.one_of(st.floats(), st.integers(), st.sampled_from(ODD))


@pytest.mark.slow
@given(ANY, ANY)
def test_any_input_gives_a_finite_rate_or_a_value_error(flop, hours):
    try:
        result = cost.rate(flop, hours)
    except ValueError as error:
        assert "cannot work" in str(error)
    else:
        assert math.isfinite(result)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numbers_of_numpy_are_numbers(kind):
    assert cost.rate(kind(7200), kind(2)) == cost.rate(7200, 2)
    assert cost.mfu(kind(156), "a100", "bf16") == 0.5
    assert total(V3, kind(4096)) == total(V3, 4096)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost.rate(-1, 2), "flop=-1 cannot work: it must be a finite number"),
        (lambda: cost.rate(1, math.nan), "hours=nan cannot work"),
        (lambda: cost.rate(1, math.inf), "hours=inf cannot work"),
        (
            lambda: cost.mfu(400, "a100", "bf16"),
            "tflops=400 cannot work: MFU is at most 1, and a100 has 312",
        ),
        (lambda: cost.mfu(-1, "a100", "bf16"), "tflops=-1 cannot work"),
        (
            lambda: cost.peak("a100", "fp8"),
            "precision='fp8' cannot work: a100 has bf16",
        ),
        (lambda: cost.peak("h800", "fp4"), "h800 has bf16 and fp8"),
        (
            lambda: cost.peak("b200", "fp8"),
            "gpu='b200' cannot work: use one of a100, h100, h20, h800",
        ),
        (lambda: cost.flops_per_token(V3, 0), "length=0 cannot work"),
        (lambda: cost.flops_per_token(V3, 8, seen=2), "seen=2 cannot work"),
    ],
)
def test_impossible_input_is_a_clear_value_error(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_rate_has_its_peak():
    with_fp8 = {key.partition(".")[0] for key in FACTS if key.endswith(".fp8")}
    assert with_fp8 == {"h100", "h800", "h20"}


# --------------------------------------------------------------------------- sliders

MOVE_EACH_SLIDER = """
from helpers.page.widgets import follow
picture = follow(sliders, bill)
assert picture.value.startswith("<img")
for slider in sliders:
    before, old = picture.value, slider.value
    slider.value = slider.max
    moved = picture.value != before
    slider.value = old
    same_text = picture.value.split(" src=")[0] == before.split(" src=")[0]
    print(slider.description, "|", moved, same_text)
"""
SLIDER_CELLS = (
    "11-setup",
    "11-words",
    "11-parameters",
    "11-project",
    "11-slider-draw",
    "11-slider",
)


@pytest.mark.slow
def test_each_slider_of_notebook_11_moves_its_picture():
    path = Path(__file__).parents[3] / "notebooks" / "11_training_cost.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.id in SLIDER_CELLS]
    assert len(cells) == len(SLIDER_CELLS)
    notebook.cells = [*cells, nbformat.v4.new_code_cell(MOVE_EACH_SLIDER)]
    beside = {"metadata": {"path": path.parent}}
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=beside
    )
    client.execute()
    text = ""
    for output in notebook.cells[-1].outputs:
        if output.output_type == "stream":
            text += output.text
    lines = text.splitlines()
    assert len(lines) == 5, lines
    assert all(line.endswith("| True True") for line in lines), lines
