"""Published config.json files, and which of their fields are understood.

A field that says something about the computation is read, translated, or allowed only
at the values that are computed here. Fields that change nothing are listed as well, so
that one which nobody has thought of is refused by name: a model that loads computes
what its file says.
"""

from collections.abc import Mapping
from typing import Any

from helpers.checks import need
from helpers.v3.native import is_native, read_native

# transformers has second names for two of our fields.
SAME_MEANING = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
}

# Fields that would change what is computed, with the only values that are. Kimi-K2 is
# this model in other sizes.
ONLY: dict[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v3", "deepseek_v3_softmax", "kimi_k2"),
    "hidden_act": ("silu",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "rope_interleave": (True,),
    "partial_rotary_factor": (1, None),
    "mtp_hidden_states_first": (False,),
    "tie_word_embeddings": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}

# Fields that change nothing in the forward pass. Names that begin with "_" are
# transformers' notes to itself and change nothing either.
ABOUT_THE_FILES = """
    architectures auto_map transformers_version torch_dtype dtype quantization_config
    torchscript use_bfloat16 tf_legacy_loss unsloth_fixed
"""
ABOUT_TOKENS_AND_LABELS = """
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    decoder_start_token_id tokenizer_class prefix id2label label2id num_labels
    problem_type finetuning_task task_specific_params
"""
ABOUT_TRAINING = """
    aux_loss_alpha router_aux_loss_coef gradient_checkpointing
"""
# How it is run: in parallel, with a cache, with what in the answer.
ABOUT_RUNNING = """
    use_cache ep_size pretraining_tp attn_implementation chunk_size_feed_forward
    is_decoder tie_encoder_decoder cross_attention_hidden_size
    return_dict use_return_dict output_hidden_states output_attentions
    output_router_logits output_scores return_dict_in_generate
"""
ABOUT_GENERATION = """
    do_sample temperature top_k top_p typical_p early_stopping num_beams
    num_beam_groups num_return_sequences diversity_penalty repetition_penalty
    length_penalty max_length min_length no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty
"""
# MLA has a key and a value for each head and its own head sizes, whatever these say.
DERIVED = "num_key_value_heads qk_head_dim head_dim"
PASSED_OVER = frozenset(
    " ".join(
        (
            ABOUT_THE_FILES,
            ABOUT_TOKENS_AND_LABELS,
            ABOUT_TRAINING,
            ABOUT_RUNNING,
            ABOUT_GENERATION,
            DERIVED,
        )
    ).split()
)


def read_published(config: object, known: frozenset[str]) -> dict[str, Any]:
    """The V3Config fields (their names: `known`) that a published config sets.

    Understood are the config.json of DeepSeek-V3 on Hugging Face, transformers' own
    form of it, that of Kimi-K2, and the files of DeepSeek's inference code. Raises
    ValueError that names the first field which asks for what is not computed.
    """
    if not isinstance(config, Mapping):
        kind = type(config).__name__
        raise ValueError(f"a config must be a JSON object, not {kind}")
    if is_native(config):
        return read_native(config)

    fields = _with_our_names(config)
    _move_rope(fields)
    for name, value in fields.items():
        if name in ONLY:
            allowed = ONLY[name]
            need(value in allowed, name, value, f"only {allowed[0]!r} is computed here")
            continue
        need(
            name in known or name in PASSED_OVER or str(name).startswith("_"),
            name,
            value,
            "this field is not known here and may change what is computed; take it out "
            "of the config if it does not",
        )
    return {name: value for name, value in fields.items() if name in known}


def _with_our_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy under our names. ValueError where two names of one thing disagree."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        ours = SAME_MEANING.get(name, name)
        need(
            ours not in fields or fields[ours] == value,
            name,
            value,
            f"the config also has {ours}={fields.get(ours)!r} for the same thing",
        )
        fields[ours] = value
    return fields


def _move_rope(fields: dict[str, Any]) -> None:
    """Change `fields`: what is said of RoPE becomes `rope_theta` and `rope_scaling`.

    The published form is `rope_scaling`; transformers 5 has all of it, and the theta,
    in `rope_parameters`.
    """
    rope = fields.pop("rope_parameters", None)
    scaling = fields.get("rope_scaling")
    if rope is not None:
        whole = (
            isinstance(rope, Mapping) and rope.get("partial_rotary_factor", 1.0) == 1
        )
        need(
            whole and scaling is None,
            "rope_parameters",
            rope,
            "it must be null, or an object with partial_rotary_factor 1 or none and "
            "no rope_scaling beside it",
        )
        scaling = {"rope_type": rope.get("type", "default"), **rope}
        scaling.pop("partial_rotary_factor", None)
    if not isinstance(scaling, Mapping):
        return

    scaling = dict(scaling)  # a copy: transformers writes into the dicts it is given
    if "rope_theta" in scaling:
        fields["rope_theta"] = scaling.pop("rope_theta")
    plain = scaling.get("rope_type", scaling.get("type")) == "default"
    fields["rope_scaling"] = None if plain else scaling
