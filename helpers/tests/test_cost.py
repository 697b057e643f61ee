"""FLOPs against torch's counter, the printed digits of the sources, and sliders that move their picture."""

import math
from pathlib import Path

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

from helpers import cost
from helpers.facts import FACTS, PEERS, V3_CONFIG, fact
from helpers.model import DeepSeekV3, V3Config

V3 = V3Config.deepseek_v3()
LLAMA, MIXTRAL, MIXTRAL_22B = (AutoConfig.for_model(PEERS[name][0], **PEERS[name][1])
                               for name in ("Llama 3.1 405B", "Mixtral 8x7B", "Mixtral 8x22B"))
SMALL = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
B, T = 2, 12


def value(key):
    return fact(key).value


def total(config, length, **options):
    return sum(cost.flops_per_token(config, length, **options).values())


def counted(step):
    """Floating-point operations of `step()` and its backward pass, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


# -------------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_shared_experts": 0}, {"first_k_dense_replace": 4}])
def test_flops_of_our_v3_are_what_torch_counts(changes):
    # 37 takes the experts' path without grouped_mm; values as wide as keys (48), as narrower ones are padded for the fused kernels
    config = V3Config.tiny(moe_intermediate_size=37, num_nextn_predict_layers=2, v_head_dim=48, **changes)
    model, ids = DeepSeekV3(config), torch.randint(config.vocab_size, (B, T))
    with sdpa_kernel(SDPBackend.MATH):
        plain = counted(lambda: model(ids).sum())
    assert plain == B * T * total(config, T, seen=1)

    def all_heads():
        hidden = model.hidden(ids)
        return sum(logits.sum() for logits in [model.lm_head(model.norm(hidden)), *model.predict_further(hidden, ids)])

    with sdpa_kernel(SDPBackend.MATH):
        further = counted(all_heads) - plain
    per_depth = [cost.flops_per_token(config, T - depth, seen=1, mtp=True)["MTP"] / 2 for depth in (1, 2)]  # each sees one token fewer
    assert further == B * sum((T - depth) * flops for depth, flops in zip((1, 2), per_depth, strict=True))


@pytest.mark.parametrize(("kind", "changes"), [
    ("llama", {}), ("llama", {"head_dim": 24}), ("qwen2", {}), ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})])
def test_flops_of_transformers_models_are_what_torch_counts(kind, changes):
    config = AutoConfig.for_model(kind, **SMALL, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **({"experts_implementation": "eager"} if "mix" in kind else {}))
    ids = torch.randint(config.vocab_size, (B, T))
    assert counted(lambda: model(ids, use_cache=False).logits.sum()) == B * T * total(config, T, seen=1)


@pytest.mark.parametrize("config", [V3Config.tiny(), V3Config.tiny(q_lora_rank=None), V3Config.tiny(num_nextn_predict_layers=0)])
def test_weights_are_the_models_own(config):
    model = DeepSeekV3(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sum(stored for stored, _ in cost.weights(config, mtp=True).values()) == matrices


def test_a_transformers_config_of_v3_gives_the_same_counts():
    config = AutoConfig.for_model(**{k: v for k, v in V3_CONFIG.items() if k not in ("quantization_config", "rope_scaling", "rope_theta")})
    assert cost.flops_per_token(config, 4096, mtp=True) == cost.flops_per_token(V3, 4096, mtp=True)


def test_printed_parameter_counts():
    assert [round(sum(part) / 1e9, 2) for part in zip(*cost.weights(V3).values(), strict=True)] == [671.03, 37.55]
    assert [round(sum(part) / 1e9, 2) for part in zip(*cost.weights(LLAMA).values(), strict=True)] == [405.85, 405.85]
    assert [round(sum(part) / 1e9, 2) for part in zip(*cost.weights(MIXTRAL).values(), strict=True)] == [46.70, 12.88]
    stored, used = (sum(part) / 1e9 for part in zip(*cost.weights(MIXTRAL_22B).values(), strict=True))
    assert (round(stored, 1), round(used, 2)) == (140.6, 39.15)


def test_printed_flops_and_rates():
    per_token = total(V3, 4096)
    assert round(per_token / 1e9, 1) == value("v3.train_gflops_recomputed") == 250.5
    assert round(total(LLAMA, 4096) / 1e9) == 2473 and round(total(LLAMA, 4096, seen=0.25) / 1e9, 1) == 2447.9
    printed = value("v3.train_gflops") * 1e9 * value("v3.tokens")
    assert round(cost.rate(printed, value("v3.gpu_hours_pretrain"))) == value("v3.tflops_per_gpu_recomputed") == 386
    assert round(cost.rate(value("llama405b.flops"), value("llama405b.gpu_hours"))) == 342
    assert round(total(V3, 4096, seen=1) / per_token, 2) == round(value("v3.tflops_noncausal") / value("v3.tflops_per_gpu"), 2)


def test_printed_tokens_per_day_and_hours():
    per_day = value("v3.train.batch_end") * value("v3.train.seq_len") / value("v3.step_seconds") * 86400
    assert round(per_day / 1e9, 1) == round(value("v3.tokens_per_day") / 1e9, 1) == 272.8
    per_trillion = value("v3.gpus") * 24 * 1e12 / per_day
    assert round(per_trillion, -3) == value("v3.gpu_hours_per_trillion") and round(1e12 / per_day, 1) == value("v3.days_per_trillion")
    assert value("v3.gpu_hours_per_trillion") * value("v3.tokens") / 1e12 == value("v3.gpu_hours_pretrain")
    assert round(value("v3.gpu_hours_pretrain") / value("v3.gpus") / 24, 1) == 54.2


def test_mfu_names_its_peak():
    assert cost.mfu(value("v3.tflops_per_gpu"), "h800", "bf16") == pytest.approx(value("v3.mfu"), abs=0.0006)
    assert cost.mfu(value("v3.tflops_noncausal"), "h800", "bf16") == pytest.approx(value("v3.mfu_noncausal"), abs=0.0006)
    assert round(cost.mfu(value("v3.tflops_per_gpu"), "h800", "fp8"), 3) == 0.195
    assert cost.mfu(value("llama405b.tflops_per_gpu"), "h100", "bf16") == pytest.approx(value("llama405b.mfu"), abs=0.006)


# --------------------------------------------------------------------------------------------------------- hours and dollars


def test_printed_dollars_and_ratios():
    v3 = sum(value(f"v3.gpu_hours_{stage}") for stage in ("pretrain", "context", "post"))
    r1 = sum(value(f"r1.gpu_hours_{stage}") for stage in ("zero", "sft_data", "r1"))
    assert (v3, r1) == (value("v3.gpu_hours"), value("r1.gpu_hours"))
    assert v3 * 2 == value("v3.usd") == 5.576e6 and r1 * 2 == value("r1.usd")
    assert (v3 + r1) * 2 == value("r1.usd_with_base") == 5.87e6
    assert round(value("llama405b.gpu_hours") / v3, 1) == 11.1 and round(value("llama31.gpu_hours") / v3, 1) == value("article.gpu_hours_ratio")
    assert round(value("fleet.a100_rumoured") * 168 * value("fleet.a100_usd_per_hour") / 1e6, 2) == 11.34
    assert value("r1.gpus") * value("r1.wall_hours_zero") == 101376 and round(value("r1.gpus") * value("r1.wall_hours_r1"), -3) == 41e3
    hopper = value("fleet.hopper_h800") + value("fleet.hopper_h100") + value("fleet.hopper_h20")
    assert hopper == value("fleet.hopper")


POSITIVE = st.floats(min_value=1e-9, max_value=1e30)


@given(POSITIVE, POSITIVE)
def test_rates_are_linear(flop, tflops):
    hours = flop / (tflops * 1e12) / 3600
    assume(hours >= 1e-9)
    assert cost.rate(flop, hours) == pytest.approx(tflops) and cost.rate(2 * flop, hours) == pytest.approx(2 * tflops)


ANY = st.one_of(st.floats(), st.integers(), st.sampled_from([None, "2", True, 1j, 10**400, [1.0], np.nan, np.array([1.0, np.inf])]))


@given(ANY, ANY)
def test_any_input_gives_a_finite_rate_or_a_value_error(flop, hours):
    try:
        result = cost.rate(flop, hours)
    except ValueError as error:
        assert "cannot be" in str(error)
    else:
        assert math.isfinite(result)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: cost.rate(-1, 2), "flop=-1 cannot be: use a finite number"),
    (lambda: cost.rate(1, math.nan), "hours=nan"),
    (lambda: cost.rate(1, math.inf), "hours=inf"),
    (lambda: cost.mfu(400, "a100", "bf16"), "tflops=400 cannot be: MFU is at most 1, and a100 has 312"),
    (lambda: cost.peak("a100", "fp8"), "precision='fp8' is not on a100: use bf16"),
    (lambda: cost.peak("h800", "fp4"), "use bf16 or fp8"),
    (lambda: cost.peak("b200", "fp8"), "gpu='b200' is not known: use one of a100, h100, h20, h800"),
    (lambda: cost.flops_per_token(V3, 0), "length=0"),
    (lambda: cost.flops_per_token(V3, 8, seen=2), "seen=2"),
    (lambda: cost.flops_per_token(AutoConfig.for_model("gpt2"), 8), "model_type='gpt2' is not counted"),
])
def test_impossible_input_is_a_clear_value_error(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_rate_has_its_peak():
    assert {key.partition(".")[0] for key in FACTS if key.endswith(".fp8")} == {"h100", "h800", "h20"}


# -------------------------------------------------------------------------------------------------------------------- sliders

MOVE_EACH_SLIDER = """
from ipywidgets import HTML
from ipywidgets.widgets.widget import _instances
[picture] = [w for w in _instances.values() if isinstance(w, HTML) and w.value.startswith("<img")]
for slider in sliders:
    seen, old = [picture.value], slider.value
    slider.value = slider.max
    seen.append(picture.value)
    slider.value = old
    print(slider.description, "|", seen[0] != seen[1], picture.value.split(" src=")[0] == seen[0].split(" src=")[0])
"""


def test_each_slider_of_notebook_11_moves_its_picture():
    path = Path(__file__).parents[2] / "notebooks" / "11_training_cost.ipynb"
    notebook = nbformat.read(path, as_version=4)
    needed = ("11-setup", "11-words", "11-parameters", "11-project", "11-slider-draw", "11-slider")
    cells = [cell for cell in notebook.cells if cell.id in needed]
    assert len(cells) == len(needed)
    notebook.cells = [*cells, nbformat.v4.new_code_cell(MOVE_EACH_SLIDER)]
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()
    lines = "".join(output.text for output in notebook.cells[-1].outputs if output.output_type == "stream").splitlines()
    assert len(lines) == 5 and all(line.endswith("| True True") for line in lines), lines
