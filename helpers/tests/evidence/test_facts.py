"""The figures agree with each other, with the published shapes and with the sources."""

import copy
import subprocess
import sys

from helpers.checks import InputError
from helpers.evidence import facts
from helpers.evidence.facts import (
    FACTS,
    PEERS,
    SOURCES,
    STATUSES,
    V3_CONFIG,
    Fact,
    fact,
    read_fact,
    read_toml,
    source_keys,
)

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

WITH_PREFIX = [
    ("Llama 3.1 405B", "llama405b"),
    ("Mixtral 8x7B", "mixtral8x7b"),
    ("Mixtral 8x22B", "mixtral8x22b"),
]


def value(key):
    return fact(key).value


def meta_model(model_type, kwargs):
    config = AutoConfig.for_model(model_type, **kwargs)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------- the file


def test_every_source_key_is_explained():
    used = {key for entry in FACTS.values() for key in source_keys(entry.source)}
    assert used - SOURCES.keys() == set()


def test_status_must_be_known():
    assert {entry.status for entry in FACTS.values()} <= STATUSES.keys()
    with pytest.raises(ValueError, match="status='CHECKED' cannot work: use one of"):
        Fact(1, "", "V3", "CHECKED")


def test_a_search_for_a_key_finds_its_table():
    lines = (facts.FOLDER / "facts.toml").read_text(encoding="utf-8").splitlines()
    headers = [line for line in lines if line.startswith("[")]
    assert headers == [f'["{key}"]' for key in FACTS]


def test_numbers_ranges_and_pairs_keep_their_types():
    assert type(value("v3.gpus")) is int
    assert type(value("v3.tokens")) is float
    assert type(value("date.v3")) is str
    assert value("gpt4.days") == (90, 100)
    assert value("v3.mtp_acceptance") == (0.85, 0.90)
    assert value("v25.distil")["its length"] == (718, 783)
    assert value("deepep.dispatch")["EP8"] == 153


GOOD = {"value": 1, "source": "V3 §1", "status": "VERIFIED"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valeu": 1}, "v3.x: field='valeu' cannot work: use one of value, range"),
        ({"range": [1, 2]}, "fields=['value', 'range'] cannot work: give exactly one"),
        ({"value": None}, "fields=[] cannot work: give exactly one kind"),
        ({"value": [1, 2]}, "v3.x: value=[1, 2] cannot work: give a number, or a text"),
        ({"value": True}, "value=True cannot work: give a number"),
        ({"value": float("nan")}, "value=nan cannot work: it must be a finite number"),
        ({"value": None, "range": [2, 1]}, "range=[2, 1] cannot work: the lower end"),
        ({"value": None, "range": [1]}, "range=[1] cannot work: give two numbers"),
        ({"value": None, "range": [1, "2"]}, "range='2' cannot work"),
        ({"value": None, "values": {}}, "values={} cannot work: give at least one"),
        ({"value": None, "values": 3}, "values=3 cannot work"),
        ({"value": None, "values": {"a": [1, 2]}}, "values=[1, 2] cannot work"),
        ({"value": None, "pairs": {"a": 1}}, "pairs=1 cannot work: give two numbers"),
        ({"unit": 3}, "v3.x: unit=3 cannot work: it must be a str"),
        ({"source": "V9 §1"}, "v3.x: source='V9 §1' cannot work: name keys"),
        ({"source": "V3 §1; V9"}, "source='V3 §1; V9' cannot work"),
        ({"source": None}, "source='' cannot work: name keys"),
        ({"source": " ; "}, "source=' ; ' cannot work"),
        ({"status": "CHECKED"}, "v3.x: status='CHECKED' cannot work: use one of VERIF"),
        ({"status": None}, "v3.x: status='' cannot work"),
    ],
)
def test_a_malformed_fact_is_refused_by_its_key(changes, message):
    row = {k: v for k, v in (GOOD | changes).items() if v is not None}
    with pytest.raises(InputError) as error:
        read_fact("v3.x", row)
    assert message in str(error.value)
    assert str(error.value).startswith("v3.x: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["v3.a"]\nvalue = 1\n["v3.a"]\nvalue = 2\n', r"mine.toml .*v3\.a.*twice"),
        ('["v3.a"]\nvalue = 1\nvalue = 2\n', "mine.toml .*line 3"),
        ("value = 1 2\n", "mine.toml .*line 1"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_toml("mine.toml", tmp_path)


def test_facts_can_be_read_without_torch():
    code = "import sys, helpers.evidence.facts; print('torch' in sys.modules)"
    root = facts.FOLDER.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"'v3\.totl_params'.*v3\.total_params"):
        fact("v3.totl_params")


# --------------------------------------------------------------------- how they print


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("v3.total_params", "671B parameters (V3 §4.2; VERIFIED)"),
        ("v3.tokens", "14.8T tokens (V3 §4.2; VERIFIED)"),
        ("v3.gpu_hours", "2.788M H800 hours (V3 Table 1; VERIFIED)"),
        ("v3.kv_bytes", "70,272 bytes per token (ISCA Table 1; VERIFIED)"),
        ("v3.train.lr", "2.2e-4 (V3 §4.2; VERIFIED)"),
        ("v3.mtp_acceptance", "0.85–0.9 of second tokens (V3 §5.4.3; VERIFIED)"),
        ("llama405b.flops", "3.8e25 FLOP (L3 §1; VERIFIED)"),
        ("fleet.a100_usd_per_hour", "1.35 USD per A100 hour (ART; not checked)"),
        ("date.r1_cost", "2025-09-17 (Nature; VERIFIED-2)"),
    ],
)
def test_a_fact_prints_its_number_and_origin(key, text):
    assert str(fact(key)) == text


def test_ablation_rows_print_and_show_where_the_change_hurt():
    assert "MMLU 67.5→66.6" in str(fact("v3.mtp_ablation_large"))
    assert "without and with MTP" in repr(fact("v3.mtp_ablation_large"))
    worse = {}
    for key in FACTS:
        if "ablation" in key:
            rows = value(key).items()
            worse[key] = [name for name, (before, after) in rows if after < before]
            # bits per byte are better when lower
            worse[key] = [name for name in worse[key] if name != "Pile BPB"]
    assert worse == {
        "v3.mtp_ablation_small": ["NaturalQ"],
        "v3.mtp_ablation_large": ["MMLU"],
        "v3.loss_free_ablation_small": ["MBPP"],
        "v3.loss_free_ablation_large": ["MMLU"],
    }


# ------------------------------------------------------------------ published shapes


@pytest.mark.parametrize(("name", "prefix"), WITH_PREFIX)
def test_peer_parameter_counts(name, prefix):
    model_type, kwargs = PEERS[name]
    total = count(meta_model(model_type, kwargs))
    assert round(total / 1e9, 2) == value(f"{prefix}.recomputed_total") / 1e9
    if model_type == "mixtral":
        expert = 3 * kwargs["hidden_size"] * kwargs["intermediate_size"]
        idle = kwargs["num_local_experts"] - kwargs["num_experts_per_tok"]
        active = total - kwargs["num_hidden_layers"] * idle * expert
        assert round(active / 1e9, 2) == value(f"{prefix}.recomputed_active") / 1e9
        assert round(active / total, 3) == value(f"{prefix}.active_fraction")


def test_v3_parameter_counts():
    c = copy.deepcopy(V3_CONFIG)  # transformers writes into the dicts it is given
    left_out = ("model_type", "architectures", "quantization_config", "torch_dtype")
    kwargs = {k: v for k, v in c.items() if k not in left_out}
    model = meta_model(c["model_type"], kwargs)

    expert = 3 * c["hidden_size"] * c["moe_intermediate_size"]
    moe_layers = c["num_hidden_layers"] - c["first_k_dense_replace"]
    idle = (c["n_routed_experts"] - c["num_experts_per_tok"]) * expert
    total = count(model)
    table = c["vocab_size"] * c["hidden_size"]
    active = total - moe_layers * idle
    # one more layer and eh_proj; norms are too small to show
    mtp = count(model.model.layers[-1]) + 2 * c["hidden_size"] ** 2

    counted = {
        "recomputed_total": total,
        "recomputed_active_with_emb_head": active,
        "recomputed_active_head_only": active - table,
        "recomputed_active_neither": active - 2 * table,
        "mtp_unique_recomputed": mtp,
        "mtp_active_recomputed": mtp - idle + 2 * table,
        "hf_recomputed": total + mtp + 2 * table,
    }
    in_billions = {key: round(n / 1e9, 2) for key, n in counted.items()}
    assert in_billions == {key: value(f"v3.{key}") / 1e9 for key in counted}
    assert round(active / total, 3) == value("v3.active_fraction")
    routed = moe_layers * c["n_routed_experts"] * expert
    assert round(routed / total, 3) == value("v3.routed_expert_share")


@pytest.mark.parametrize(("name", "prefix"), [*WITH_PREFIX, ("Qwen2.5 72B", "qwen72b")])
def test_peer_kv_bytes(name, prefix):
    kwargs = PEERS[name][1]
    head_dim = kwargs["hidden_size"] // kwargs["num_attention_heads"]
    per_layer = 2 * 2 * kwargs["num_key_value_heads"] * head_dim
    assert per_layer * kwargs["num_hidden_layers"] == value(f"{prefix}.kv_bytes")


def test_v3_kv_bytes():
    c = V3_CONFIG
    per_layer = (c["kv_lora_rank"] + c["qk_rope_head_dim"]) * 2
    assert per_layer * c["num_hidden_layers"] == value("v3.kv_bytes") == 576 * 2 * 61


def test_configs_are_as_published():
    assert V3_CONFIG["rope_scaling"]["factor"] == 40
    assert V3_CONFIG["quantization_config"]["weight_block_size"] == [128, 128]
    assert type(V3_CONFIG["rope_theta"]) is int
    assert type(V3_CONFIG["attention_dropout"]) is float
    assert list(PEERS) == [*dict(WITH_PREFIX), "Qwen2.5 72B"]
    kind, kwargs = PEERS["Mixtral 8x7B"]
    assert kind == "mixtral"
    assert "model_type" not in kwargs


# ------------------------------------------------------------------------ arithmetic


def test_hours_and_dollars_add_up():
    pretraining = value("v3.gpu_hours_pretrain")
    context = value("v3.gpu_hours_context")
    post = value("v3.gpu_hours_post")
    price = value("v3.usd_per_gpu_hour")
    assert pretraining + context + post == value("v3.gpu_hours")
    assert value("v3.gpu_hours") * price == value("v3.usd")
    assert (pretraining + context) * price == value("v3.usd_base")
    assert value("r1.gpu_hours") * price == value("r1.usd")
    assert value("v3.usd") + value("r1.usd") == value("r1.usd_with_base")
    assert value("v3.usd_base") + value("r1.usd") == value("r1.usd_on_base")


def test_llama_hours_add_up():
    sizes = [value(f"llama{size}.gpu_hours") for size in ("8b", "70b", "405b")]
    assert sum(sizes) == pytest.approx(value("llama31.gpu_hours"))
    ratio = value("llama405b.gpu_hours") / value("v3.gpu_hours")
    assert round(ratio, 1) == value("llama405b.gpu_hours_ratio")
    dollars = value("llama405b.gpu_hours") * value("v3.usd_per_gpu_hour")
    assert dollars == pytest.approx(value("llama405b.usd"))
    # Llama 3 to 3.1: what longer context and more post-training added
    assert round(value("llama8b.gpu_hours") / value("llama3_8b.gpu_hours"), 2) == 1.12
    assert round(value("llama70b.gpu_hours") / value("llama3_70b.gpu_hours"), 2) == 1.09


def test_llama_rates_share_one_table():
    run = "16,384 GPUs, length 8192"
    assert value("llama405b.tflops_by_run")[run] == value("llama405b.tflops_per_gpu")
    assert value("llama405b.mfu_by_run")[run] == value("llama405b.mfu")
    for name, tflops in value("llama405b.tflops_by_run").items():
        printed = value("llama405b.mfu_by_run")[name]
        assert tflops / value("h100.bf16") == pytest.approx(printed, abs=0.006)


def test_fleets_add_up():
    table = dict(value("fleet.semianalysis"))
    together = table.pop("together")
    assert sum(table.values()) == together
    for gpu in ("H800", "H100", "H20"):
        assert table[gpu] == value(f"fleet.hopper_{gpu.lower()}")
    hopper = together - table["A100"]
    assert hopper == value("fleet.hopper")
    weekly = value("fleet.a100_rumoured") * value("fleet.a100_usd_per_hour") * 168
    assert weekly == pytest.approx(value("fleet.usd_per_week"))


def test_token_figures_follow_from_each_other():
    train = {key.removeprefix("v3.train."): entry.value for key, entry in FACTS.items()}
    constant = train["constant_until_tokens"]
    until_end_of_cosine = constant + train["cosine_tokens"]
    last = train["final_tokens_1"] + train["final_tokens_2"]
    assert until_end_of_cosine + last == value("v3.tokens")
    assert train["gamma_tokens"] == until_end_of_cosine
    batch = train["batch_end"] * train["seq_len"]
    assert round(batch / 1e6, 1) == train["batch_end_tokens"] / 1e6
    extension = 1000 * (1920 * 32768 + 480 * 131072)
    assert round(extension / 1e9) == value("v3.long_context_tokens") / 1e9
    per_step = tuple(1 + share for share in value("v3.mtp_acceptance"))
    assert per_step == value("v3.mtp_tokens_per_step")
    assert V3_CONFIG["topk_group"] == value("v3.node_limit")


def test_compute_figures_follow_from_each_other():
    # the second term is causal attention at length 4096
    per_token = 6 * value("v3.recomputed_active_head_only") / 1e9 + 30.7
    assert round(per_token, 1) == value("v3.train_gflops_recomputed")
    assert round(per_token, -1) == value("v3.train_gflops")
    seconds = value("v3.gpu_hours_pretrain") * 3600
    per_second = value("v3.train_gflops") * 1e9 * value("v3.tokens") / seconds
    assert round(per_second / 1e12) == value("v3.tflops_per_gpu_recomputed")
    llama = 6 * value("llama405b.params") * value("llama405b.tokens")
    assert float(f"{llama:.1e}") == value("llama405b.flops")
    peak = value("v3.tflops_noncausal") / value("v3.mfu_noncausal")
    assert round(peak) == value("h800.bf16")
    assert 2 * value("h800.bf16") == value("h800.fp8")
