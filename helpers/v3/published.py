"""Published config files, and which of their fields are understood.

A field that says something about the computation is read, translated, or allowed only
at the value that is computed here. Fields that change nothing are listed too, so that
one which nobody has thought of is refused by name: a model that loads computes what its
file says.
"""

from collections.abc import Mapping
from typing import Any

from helpers.checks import need

# Two names for one thing: transformers' newer one, and ours.
SAME_MEANING = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
}

# Fields that would change what is computed, with the only values that are.
ONLY: dict[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v3", "deepseek_v3_softmax", "kimi_k2"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "moe_layer_freq": (1,),
    "topk_method": ("noaux_tc",),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
    "sliding_window": (None,),
    "mtp_hidden_states_first": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}

# Fields that change nothing in the computation of the forward pass: about the files,
# the tokenizer, generation, training, or derived from others. MLA has a key and a value
# for each head whatever num_key_value_heads says, and its own head sizes.
PASSED_OVER = frozenset(
    """
    _name_or_path architectures auto_map transformers_version torch_dtype dtype
    quantization_config use_cache pretraining_tp ep_size use_return_dict return_dict
    output_hidden_states output_attentions output_router_logits torchscript prefix
    chunk_size_feed_forward id2label label2id problem_type finetuning_task
    task_specific_params tokenizer_class tf_legacy_loss use_bfloat16 pruned_heads
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id is_decoder
    decoder_start_token_id forced_bos_token_id forced_eos_token_id
    cross_attention_hidden_size
    temperature top_k top_p typical_p repetition_penalty length_penalty
    do_sample early_stopping num_beams num_beam_groups diversity_penalty
    max_length min_length no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences remove_invalid_values begin_suppress_tokens
    suppress_tokens exponential_decay_length_penalty output_scores
    return_dict_in_generate
    aux_loss_alpha router_aux_loss_coef
    num_key_value_heads qk_head_dim head_dim
    """.split()  # noqa: SIM905
)

# DeepSeek's own inference code has names of its own (V3repo, inference/model.py).
NATIVE_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "score_func": "scoring_func",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rope_theta": "rope_theta",
}
# Their values where a file leaves them out: the defaults of that code's ModelArgs.
NATIVE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_seq_len": 16384,
    "original_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
}
NATIVE_PASSED_OVER = frozenset({"dtype", "max_batch_size", "scale_fmt", "scale_dtype"})


def read_published(config: object, known: frozenset[str]) -> dict[str, Any]:
    """The V3Config fields (their names: `known`) that a published config sets.

    Understood are the config.json of DeepSeek-V3 on Hugging Face, transformers' own
    form of it, that of Kimi-K2, and the files of DeepSeek's inference code. Raises
    ValueError that names the first field which asks for what is not computed.
    """
    if not isinstance(config, Mapping):
        kind = type(config).__name__
        raise ValueError(f"a config must be a JSON object, not {kind}")
    if "n_layers" in config or "dim" in config:
        return _read_native(config)
    fields = _with_our_names(config)
    for name, value in fields.items():
        if name in ONLY:
            allowed = ONLY[name]
            need(value in allowed, name, value, f"only {allowed[0]!r} is computed here")
        elif not (name in known or name in PASSED_OVER or name == "rope_parameters"):
            raise ValueError(
                f"{name}={value!r} is not known here and may change what is computed: "
                "take the field out if it does not"
            )
    _move_rope(fields)
    return {name: value for name, value in fields.items() if name in known}


def _with_our_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy under our names; where a file has both names, ours counts."""
    fields = {}
    for name, value in config.items():
        ours = SAME_MEANING.get(name, name)
        if ours == name or ours not in config:
            fields[ours] = value
    return fields


def _move_rope(fields: dict[str, Any]) -> None:
    """Change `fields`: transformers 5's `rope_parameters` become theta and scaling."""
    rope = fields.pop("rope_parameters", None)
    if rope is not None:
        whole = (
            isinstance(rope, Mapping) and rope.get("partial_rotary_factor", 1.0) == 1
        )
        need(
            whole,
            "rope_parameters",
            rope,
            "it must be null, or an object with partial_rotary_factor 1 or none",
        )
        if "rope_theta" in rope:
            fields["rope_theta"] = rope["rope_theta"]
        moved = {"rope_type": rope.get("type", "default")}
        moved.update((k, v) for k, v in rope.items() if k != "rope_theta")
        fields["rope_scaling"] = moved
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, Mapping):
        plain = scaling.get("rope_type", scaling.get("type")) == "default"
        # a copy: transformers writes into the dicts that it is given
        fields["rope_scaling"] = None if plain else dict(scaling)


def _read_native(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a config of DeepSeek's inference code, for instance config_671B.json.

    Missing fields have that code's own defaults. Its YaRN is on when max_seq_len goes
    beyond original_seq_len, as it does by default. It has no MTP.
    """
    for name in config:
        if name not in NATIVE_DEFAULTS and name not in NATIVE_PASSED_OVER:
            raise ValueError(
                f"{name}={config[name]!r} is not known among the fields of DeepSeek's "
                "inference code: take it out, or give a config.json of Hugging Face"
            )
    values = NATIVE_DEFAULTS | dict(config)
    softmax = values["score_func"] == "softmax"
    # with softmax that code scores a group by its best expert, not by its best two
    need(
        not softmax or values["n_expert_groups"] == 1,
        "score_func",
        "softmax",
        "with n_expert_groups above 1 (DeepSeek-V2) it is not computed here",
    )
    fields = {ours: values[native] for native, ours in NATIVE_NAMES.items()}
    fields["q_lora_rank"] = values["q_lora_rank"] or None  # 0 stands for none there
    fields["norm_topk_prob"] = not softmax
    fields["num_nextn_predict_layers"] = 0
    fields["max_position_embeddings"] = values["max_seq_len"]
    if values["max_seq_len"] > values["original_seq_len"]:
        stretched = values["rope_factor"] * values["original_seq_len"]
        fields["max_position_embeddings"] = int(stretched)
        fields["rope_scaling"] = {
            "type": "yarn",
            "factor": values["rope_factor"],
            "original_max_position_embeddings": values["original_seq_len"],
            "beta_fast": values["beta_fast"],
            "beta_slow": values["beta_slow"],
            "mscale": values["mscale"],
            "mscale_all_dim": values["mscale"],
        }
    return fields
