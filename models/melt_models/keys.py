"""Keys of other families' ``config.json`` that are not read: which of them are harmless, and which must be refused.

A key that a model's own code reads may change what is computed: loops, scales, caps, windows, norms. So a key that is
unknown here is refused, unless it stands in a list of harmless ones or has a value that asks for nothing.
"""

from collections.abc import Collection, Mapping
from typing import Any

from melt_models.forms import shown

FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "rope_interleaved"), (False,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "early_exit_threshold"), (1.0,)),
    "pretraining_tp": (1,),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logit_scale", "logits_scaling"), (1,)),
    **dict.fromkeys(("embedding_scale", "residual_scale", "scale_emb", "scale_depth"), (1,)),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "num_nextn_predict_layers"), (0,)),
    **dict.fromkeys(("is_causal", "causal", "use_rope", "scale_attn_weights", "use_rms_norm", "pre_norm"), (True,)),
    "hidden_activation": ("silu",),
}
"""Keys with the values that say what is computed here anyway; any other value is refused. Null is an absent key."""

LOOPS = (
    *("total_ut_steps", "num_loops", "n_loops", "loops", "loop_count", "num_recurrences"),
    *("mean_recurrence", "recurrent_depth", "recurrence_steps", "num_recurrent_steps"),
)
"""Keys that name the number of loops; what they say must be what the model has."""

SILENT = frozenset(
    {
        *("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
        *("attention_dropout", "is_llama_config", "max_window_layers", "name_or_path", "transformers.js_config"),
        *("unk_token_id", "sep_token_id", "decoder_start_token_id", "quantization_config"),
        # What transformers and its tools keep for themselves.
        *("_name_or_path", "_model_name_or_path", "_commit_hash", "_from_auto", "_flash_attn_2_enabled"),
        *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
        "_experts_implementation",
        *("_from_model_config", "_auto_class", "_num_labels", "_diffusers_version", "_pre_quantization_dtype"),
        # What PreTrainedConfig has and a forward pass for the next token does not read.
        *("attn_implementation", "experts_implementation", "output_attentions", "output_hidden_states", "return_dict"),
        *("output_scores", "return_dict_in_generate", "torchscript", "use_bfloat16", "tf_legacy_loss"),
        *("chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
        *("task_specific_params", "tokenizer_class", "is_decoder"),
        # Of training alone.
        *("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "hidden_dropout_prob"),
        *("attention_probs_dropout_prob", "classifier_dropout", "embedding_dropout", "residual_dropout"),
        *("gradient_checkpointing", "neftune_noise_alpha", "router_aux_loss_coef"),
    }
)
"""Keys that change no number of a forward pass, or are looked at elsewhere."""

NOTED = frozenset(
    {
        # Generation, as older releases of transformers kept it here: generation_config.json is what counts.
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty", "generation_config"),
        # Where a checkpoint comes from, and how others run it.
        *("author", "base_model", "dataset", "datasets", "date", "description", "language", "license"),
        *("comment", "_comment"),
        *("trained_by", "url", "version", "unsloth_fixed", "unsloth_version", "model_max_length"),
        *("max_sequence_length", "tokenizer_model_max_length", "use_flash_attn", "use_flash_attention"),
        *("use_flash_attention_2", "flash_attn", "pipeline_tag", "seed", "training_args"),
        "original_max_position_embeddings",  # counts with scaled positions alone, which are refused
    }
)
"""Keys that change no number of a forward pass either, and are passed over with a note."""


def check_keys(
    values: Mapping[str, Any], read: Collection[str], where: str, faults: list[str], loops: int = 1
) -> list[str]:
    """Refuses every key that is not read and may change what is computed.

    Args:
        values: the content of ``config.json``.
        read: keys that the family's reader takes or checks.
        where: the file's name in messages.
        faults: is added to.
        loops: how many the model has.

    Returns:
        What was passed over, a sentence each.
    """
    passed, model_type = [], values.get("model_type")
    fixed = {**dict.fromkeys(LOOPS, (loops,)), **FIXED}
    for name in sorted(values):
        value = values[name]
        if name in read or name in SILENT:
            continue
        if name in fixed:
            if value is not None and not any(value == each and _kind(value) is _kind(each) for each in fixed[name]):
                faults.append(
                    f"{where}: {name} must be {shown(fixed[name][0])}, got {shown(value)}: the models here have "
                    f"nothing else under model_type {shown(model_type)}"
                )
        elif name in NOTED or _asks_nothing(value):
            passed.append(name)
        else:
            faults.append(
                f"{where}: {name} is unknown under model_type {shown(model_type)}, got {shown(value)}: it may change "
                "what the model computes, which is not implemented; remove the key if it does not"
            )
    return [f"keys of {where} that mean nothing here are passed over: {', '.join(passed)}"] if passed else []


def _asks_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _kind(value: Any) -> type:
    """Truth values apart from numbers, whole ones with the others."""
    return float if type(value) is int else type(value)
