"""The figures agree with each other, with the published shapes and with the source list."""

import copy
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.facts import CLAIMS, FACTS, PEERS, SOURCES, STATUSES, V3_CONFIG, Fact, fact, source_keys


def value(key):
    return fact(key).value


def meta_model(model_type, kwargs):
    config = AutoConfig.for_model(model_type, **kwargs)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count(module):
    return sum(p.numel() for p in module.parameters())


def head_dim(kwargs):
    return kwargs["hidden_size"] // kwargs["num_attention_heads"]


def test_every_source_key_is_explained():
    used = {key for entry in [*FACTS.values(), *CLAIMS] for key in source_keys(entry.source)}
    assert used - SOURCES.keys() == set()


def test_status_must_be_known():
    assert {f.status for f in FACTS.values()} <= STATUSES.keys()
    with pytest.raises(ValueError, match="'CHECKED'"):
        Fact(1, "", "V3", "CHECKED")


def test_claims_a_to_p_each_name_one_notebook():
    assert "".join(c.letter for c in CLAIMS) == "abcdefghijklmnop"
    for c in CLAIMS:
        assert re.fullmatch(r"(0[1-9]|1[01])_[a-z][a-z0-9_]+", c.notebook), c
        assert re.search("CORRECT|PARTLY|WRONG|UNVERIFIABLE", c.verdict), c
        assert c.claim.endswith(".") and c.question.endswith("?") and c.correction.endswith("."), c


def test_claim_notebooks_have_one_name_per_number():
    names = {c.notebook for c in CLAIMS}
    assert len({name[:2] for name in names}) == len(names)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"'v3\.totl_params'.*v3\.total_params"):
        fact("v3.totl_params")


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
    ],
)
def test_a_fact_prints_its_number_and_origin(key, text):
    assert str(fact(key)) == text


def test_ablation_rows_print_and_show_where_the_change_hurt():
    assert "MMLU 67.5→66.6" in str(fact("v3.mtp_ablation_large"))
    assert "without and with MTP" in repr(fact("v3.mtp_ablation_large"))
    worse = {key: [b for b, (old, new) in value(key).items() if b != "Pile BPB" and new < old] for key in FACTS if "ablation" in key}
    assert worse == {"v3.mtp_ablation_small": ["NaturalQ"], "v3.mtp_ablation_large": ["MMLU"],
                     "v3.loss_free_ablation_small": ["MBPP"], "v3.loss_free_ablation_large": ["MMLU"]}


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("Llama 3.1 405B", "llama405b"), ("Mixtral 8x7B", "mixtral8x7b"), ("Mixtral 8x22B", "mixtral8x22b")],
)
def test_peer_parameter_counts(name, prefix):
    model_type, kwargs = PEERS[name]
    total = count(meta_model(model_type, kwargs))
    assert round(total / 1e9, 2) == value(f"{prefix}.recomputed_total") / 1e9
    if model_type == "mixtral":
        idle = kwargs["num_local_experts"] - kwargs["num_experts_per_tok"]
        active = total - kwargs["num_hidden_layers"] * idle * 3 * kwargs["hidden_size"] * kwargs["intermediate_size"]
        assert round(active / 1e9, 2) == value(f"{prefix}.recomputed_active") / 1e9
        assert round(active / total, 3) == value(f"{prefix}.active_fraction")


def test_v3_parameter_counts():
    c = copy.deepcopy(V3_CONFIG)  # transformers writes into the dicts that it is given
    kwargs = {k: v for k, v in c.items() if k not in ("model_type", "architectures", "quantization_config", "torch_dtype")}
    model = meta_model(c["model_type"], kwargs)
    expert = 3 * c["hidden_size"] * c["moe_intermediate_size"]
    moe_layers = c["num_hidden_layers"] - c["first_k_dense_replace"]
    idle = (c["n_routed_experts"] - c["num_experts_per_tok"]) * expert
    total, table = count(model), c["vocab_size"] * c["hidden_size"]
    active = total - moe_layers * idle
    mtp = count(model.model.layers[-1]) + 2 * c["hidden_size"] ** 2  # one more layer and eh_proj; norms are too small to show
    counted = {"recomputed_total": total, "recomputed_active_with_emb_head": active, "recomputed_active_head_only": active - table,
               "recomputed_active_neither": active - 2 * table, "mtp_unique_recomputed": mtp,
               "mtp_active_recomputed": mtp - idle + 2 * table, "hf_recomputed": total + mtp + 2 * table}
    assert {k: round(v / 1e9, 2) for k, v in counted.items()} == {k: value(f"v3.{k}") / 1e9 for k in counted}
    assert round(active / total, 3) == value("v3.active_fraction")
    assert round(moe_layers * c["n_routed_experts"] * expert / total, 3) == value("v3.routed_expert_share")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("Llama 3.1 405B", "llama405b"), ("Mixtral 8x7B", "mixtral8x7b"), ("Mixtral 8x22B", "mixtral8x22b"), ("Qwen2.5 72B", "qwen72b")],
)
def test_peer_kv_bytes(name, prefix):
    kwargs = PEERS[name][1]
    assert 2 * 2 * kwargs["num_key_value_heads"] * head_dim(kwargs) * kwargs["num_hidden_layers"] == value(f"{prefix}.kv_bytes")


def test_v3_kv_bytes():
    c = V3_CONFIG
    assert (c["kv_lora_rank"] + c["qk_rope_head_dim"]) * 2 * c["num_hidden_layers"] == value("v3.kv_bytes") == 576 * 2 * 61


def test_hours_and_dollars_add_up():
    assert value("v3.gpu_hours_pretrain") + value("v3.gpu_hours_context") + value("v3.gpu_hours_post") == value("v3.gpu_hours")
    assert value("v3.gpu_hours") * value("v3.usd_per_gpu_hour") == value("v3.usd")
    llama = value("llama8b.gpu_hours") + value("llama70b.gpu_hours") + value("llama405b.gpu_hours")
    assert llama == pytest.approx(value("llama31.gpu_hours"))
    assert round(value("llama405b.gpu_hours") / value("v3.gpu_hours"), 1) == value("llama405b.gpu_hours_ratio")
    assert value("r1.gpu_hours") * value("v3.usd_per_gpu_hour") == value("r1.usd")
    assert value("v3.usd") + value("r1.usd") == value("r1.usd_with_base")
    weekly = value("fleet.a100_rumoured") * value("fleet.a100_usd_per_hour") * 168
    assert weekly == pytest.approx(value("fleet.usd_per_week"))


def test_token_and_compute_figures_follow_from_each_other():
    phases = ("constant_until_tokens", "cosine_tokens", "final_tokens_1", "final_tokens_2")
    assert sum(value(f"v3.train.{p}") for p in phases) == value("v3.tokens")
    assert value("v3.train.gamma_tokens") == value("v3.train.constant_until_tokens") + value("v3.train.cosine_tokens")
    assert round(value("v3.train.batch_end") * value("v3.train.seq_len") / 1e6, 1) == value("v3.train.batch_end_tokens") / 1e6
    assert round(1000 * (1920 * 32768 + 480 * 131072) / 1e9) == value("v3.long_context_tokens") / 1e9
    assert tuple(1 + a for a in value("v3.mtp_acceptance")) == value("v3.mtp_tokens_per_step")
    per_token = 6 * value("v3.recomputed_active_head_only") / 1e9 + 30.7  # the second term: causal attention at length 4096
    assert round(per_token, 1) == value("v3.train_gflops_recomputed")
    assert round(per_token, -1) == value("v3.train_gflops")
    flops_per_second = value("v3.train_gflops") * 1e9 * value("v3.tokens") / (value("v3.gpu_hours_pretrain") * 3600)
    assert round(flops_per_second / 1e12) == value("v3.tflops_per_gpu_recomputed")
    assert float(f"{6 * value('llama405b.params') * value('llama405b.tokens'):.1e}") == value("llama405b.flops")
    assert V3_CONFIG["topk_group"] == value("v3.node_limit")
