"""Loading models from the data cache, a folder or the hub cache, and making ones with random weights.

Nothing here touches the network; `repro data fetch` and the hub's own client do.
"""

from shared.models.language import empty_causal_lm, load_causal_lm, load_sentence_encoder, local_model
from shared.models.shapes import causal_lm_config, random_causal_lm
from shared.models.vision import load_efficientnet_lite0

__all__ = [
    "causal_lm_config",
    "empty_causal_lm",
    "load_causal_lm",
    "load_efficientnet_lite0",
    "load_sentence_encoder",
    "local_model",
    "random_causal_lm",
]
