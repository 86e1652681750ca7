from .folders import copy_configuration, fingerprint, weight_files
from .language import (
    empty_causal_lm,
    load_causal_lm,
    load_sentence_encoder,
    local_model,
)
from .loading import (
    check_length,
    end_tokens,
    load_config,
    load_pretrained,
    load_tokenizer,
)
from .lora import add_lora, load_lora, save_lora_configuration
from .shapes import causal_lm_config, empty_causal_lm_of, random_causal_lm
from .vision import load_clip, load_clip_processor, load_efficientnet_lite0
from .weights import Stored, stored_tensors

__all__ = [
    "Stored",
    "add_lora",
    "causal_lm_config",
    "check_length",
    "copy_configuration",
    "empty_causal_lm",
    "empty_causal_lm_of",
    "end_tokens",
    "fingerprint",
    "load_causal_lm",
    "load_clip",
    "load_clip_processor",
    "load_config",
    "load_efficientnet_lite0",
    "load_lora",
    "load_pretrained",
    "load_sentence_encoder",
    "load_tokenizer",
    "local_model",
    "random_causal_lm",
    "save_lora_configuration",
    "stored_tensors",
    "weight_files",
]
