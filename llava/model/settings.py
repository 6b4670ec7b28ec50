"""What the settings files of a checkpoint may hold, and what of it reaches transformers.

The bounds are far above every model of this family; they keep a damaged or hostile file from asking for work or memory
without end. What published files leave out or hold as null is allowed; unknown keys are passed over.
"""

import re
from dataclasses import fields
from typing import Any

from llava.constants import InputError
from llava.schema import FLAG, OBJECT, Fields, Listed, Rule, check_settings, choice, either, integer, number, text


def _listed(each: Any, least: int = 0, most: int = 10_000) -> Listed:
    return Listed(each, least, most)


def _optional(layout: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys((f"{name}?" for name in names), layout)


TEXT, COUNT = text(1000), integer(0, 2**31)
TOKEN = integer(-1, 2**31)
TOKENS = either(TOKEN, _listed(TOKEN))


def _activation(value: Any) -> bool:
    from transformers.activations import ACT2FN

    return isinstance(value, str) and value in ACT2FN


ACTIVATION = Rule("an activation that transformers knows", _activation)
LANGUAGE = {
    "architectures?": _listed(TEXT, 1, 10),
    "model_type?": TEXT,
    "hidden_size": integer(1, 2**16),
    "intermediate_size": integer(1, 2**18),
    "num_hidden_layers": integer(1, 512),
    "num_attention_heads": integer(1, 1024),
    "vocab_size": integer(1, 2**22),
    "hidden_act": ACTIVATION,
    "max_position_embeddings": integer(1, 2**31),
    "rms_norm_eps": number(0, 1),
    **_optional(TOKENS, "bos_token_id", "eos_token_id"),
    **_optional(TOKEN, "pad_token_id"),
    **_optional(integer(1, 1024), "num_key_value_heads"),
    **_optional(integer(2, 4096), "head_dim"),
    **_optional(integer(1, 2**31), "sliding_window", "max_sequence_length", "tokenizer_model_max_length"),
    **_optional(number(1, 1e12), "rope_theta"),
    **_optional(OBJECT, "rope_scaling", "rope_parameters", "quantization_config"),
    **_optional(FLAG, "attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"),
    **_optional(number(0, 1), "attention_dropout"),
}
MULTIMODAL = {
    "mm_hidden_size": integer(1, 2**16),
    "mm_projector_type": TEXT,
    "mm_patch_merge_type": TEXT,
    "image_aspect_ratio": TEXT,
    "mm_vision_select_layer": integer(-512, 512),
    "mm_vision_select_feature": TEXT,
    **_optional(TEXT, "mm_vision_tower"),
    **_optional(OBJECT, "mm_vision_config"),
    **_optional(FLAG, "mm_use_im_start_end", "mm_use_im_patch_token", "unfreeze_mm_vision_tower"),
    **_optional(either(text(20_000), _listed(_listed(number(1, 1e6), 2, 2))), "image_grid_pinpoints"),
    "tokenizer_padding_side": choice("left", "right"),
    "s2": Rule(
        "false: features of several scales are not supported, whose mm_hidden_size is a multiple of the tower's width",
        lambda value: value in (False, None),
    ),
    # A method's own parser says more about its text than a rule could; it must be a text that can be quoted.
    **_optional(TEXT, "method", "profile"),
    **_optional(either(Rule("a number", lambda value: type(value) in (int, float)), TEXT), "retention_ratio"),
}
TOWER = {
    "hidden_size": integer(1, 2**14),
    "intermediate_size": integer(1, 2**16),
    "num_hidden_layers": integer(1, 128),
    "num_attention_heads": integer(1, 1024),
    "num_channels": choice(3),
    "image_size": integer(1, 4096),
    "patch_size": integer(1, 512),
    "projection_dim": integer(1, 2**16),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": number(0, 1),
}
LENGTH, CHANNELS = integer(1, 4096), _listed(number(-1e3, 1e3), 3, 3)
BOX = Fields({"height": LENGTH, "width": LENGTH}, closed=True)
PREPROCESSOR = {
    "size": either(LENGTH, Fields({"shortest_edge": LENGTH}, closed=True), BOX),
    "crop_size": either(LENGTH, BOX),
    "image_mean": CHANNELS,
    "image_std": _listed(number(1e-6, 1e3), 3, 3),
    "resample": integer(0, 5),
    "rescale_factor": number(1e-9, 1e3),
}
TOKENIZER = _optional(TEXT, "tokenizer_class") | _optional(FLAG, "add_bos_token", "add_eos_token")
ADAPTER = {
    "r": integer(1, 2**16),
    "lora_alpha": number(-1e6, 1e6),
    "peft_type": TEXT,
    **_optional(either(TEXT, _listed(TEXT)), "target_modules", "exclude_modules", "modules_to_save"),
    **_optional(OBJECT, "rank_pattern", "alpha_pattern"),
}
# Of a generation config, what says how a language model alone continues: no assistants, no second outputs.
GENERATION = {
    **_optional(TOKENS, "bos_token_id", "eos_token_id"),
    **_optional(TOKEN, "pad_token_id"),
    **_optional(integer(1, 2**31), "max_length", "max_new_tokens"),
    **_optional(COUNT, "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"),
    **_optional(integer(1, 1024), "num_beams"),
    **_optional(number(0, 1e3), "temperature"),
    **_optional(number(0, 1), "top_p", "min_p", "typical_p"),
    **_optional(number(1e-3, 1e3), "repetition_penalty"),
    **_optional(number(-1e3, 1e3), "length_penalty"),
    **_optional(_listed(COUNT), "suppress_tokens", "begin_suppress_tokens"),
    **_optional(FLAG, "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"),
    **_optional(either(FLAG, choice("never")), "early_stopping"),
}
# Keys of LLaVA's own in a config.json, in families; the language model's are the fields of its config class.
FAMILIES = re.compile(r"(mm|image|tune|freeze|unfreeze|use_mm|tokenizer|rope)_\w+")
BESIDES = ("max_sequence_length", "pretraining_tp", "quantization_config")


def check_config(config: dict[str, Any]) -> None:
    """Check a config.json by its rules, and the fields that must fit each other.

    Raises:
        InputError: a field breaks its rule, or two do not fit.
    """
    check_settings(config, LANGUAGE | MULTIMODAL, "config.json")
    heads, kv_heads = (config.get(key) or 0 for key in ("num_attention_heads", "num_key_value_heads"))
    width = config.get("head_dim") or (config["hidden_size"] // heads if heads and "hidden_size" in config else 2)
    if width % 2:
        raise InputError(f"config.json's heads have a head_dim of {width}; rotary positions need an even one")
    if heads and kv_heads and heads % kv_heads:
        raise InputError(f"config.json's num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    padding, rows = config.get("pad_token_id"), config.get("vocab_size")
    if padding and rows and padding >= rows:
        raise InputError(f"config.json's pad_token_id {padding} is beyond its vocab_size {rows}")


def known_settings(cls: type, config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a config.json a config class is built from.

    transformers reads many more attributes from a config: of other tasks, of outputs, of how the model is run, names of
    files. A checkpoint must not set those; they are left out, as is what neither LLaVA nor the language model has.
    """
    from transformers import PretrainedConfig

    own = {field.name for field in fields(cls)} - {field.name for field in fields(PretrainedConfig)}
    return {k: v for k, v in config.items() if k in own or k in BESIDES or FAMILIES.fullmatch(k)}


def generation_settings(found: dict[str, Any], source: str) -> Any:
    """Return transformers' generation config from a file's object; what does not concern a language model is left out.

    Raises:
        InputError: a field breaks its rule.
    """
    from transformers import GenerationConfig

    check_settings(found, GENERATION, source)
    if found.get("do_sample") and found.get("temperature") == 0:
        raise InputError(f"{source}'s temperature must be above 0 where do_sample is true")
    return GenerationConfig(**{key: value for key, value in found.items() if {key, f"{key}?"} & GENERATION.keys()})
