"""Loading models from the data cache, a folder or the hub cache, and making ones with random
weights: the only way by which a model enters.

Nothing here touches the network; `repro data fetch` and the hub's own client do. Nothing that lies
in a model folder is run, and a folder that is not what its config.json says is refused in a line.
"""

from shared.models.folders import copy_configuration, fingerprint, weight_files
from shared.models.guard import check_finite, is_finite
from shared.models.language import (
    empty_causal_lm,
    load_causal_lm,
    load_sentence_encoder,
    local_model,
)
from shared.models.loading import (
    check_length,
    end_tokens,
    load_config,
    load_pretrained,
    load_tokenizer,
)
from shared.models.lora import add_lora, load_lora, save_lora_configuration
from shared.models.shapes import causal_lm_config, empty_causal_lm_of, random_causal_lm
from shared.models.vision import load_clip, load_clip_processor, load_efficientnet_lite0
from shared.models.weights import Stored, stored_tensors

__all__ = [
    "Stored",
    "add_lora",
    "causal_lm_config",
    "check_finite",
    "check_length",
    "copy_configuration",
    "empty_causal_lm",
    "empty_causal_lm_of",
    "end_tokens",
    "fingerprint",
    "is_finite",
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
