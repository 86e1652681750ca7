from .folders import copy_configuration, fingerprint, weight_files
from .language import (
    empty_causal_lm,
    load_causal_lm,
    load_sentence_encoder,
    local_model,
)
from .lora import add_lora, save_lora_configuration
from .shapes import causal_lm_config, random_causal_lm
from .vision import load_efficientnet_lite0

__all__ = [
    "add_lora",
    "causal_lm_config",
    "copy_configuration",
    "empty_causal_lm",
    "fingerprint",
    "load_causal_lm",
    "load_efficientnet_lite0",
    "load_sentence_encoder",
    "local_model",
    "random_causal_lm",
    "save_lora_configuration",
    "weight_files",
]
