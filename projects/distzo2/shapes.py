"""The shape of a user's model, as the cost model sees it: from a configuration of transformers, by
making the model without memory for its parameters.
"""

from typing import Any

from projects.distzo2.cost_model import Shape
from projects.zo2.units import find_blocks
from shared.errors import UserError
from shared.models import causal_lm_config, empty_causal_lm, empty_causal_lm_of, local_model
from shared.models.shapes import OPT_SHAPES


def shape_of(model: str) -> Shape:
    """Of one of OPT's sizes by name, or of a model folder or one in the hub cache. Raises UserError
    where there is neither.
    """
    if model in OPT_SHAPES:
        return shape_of_model(empty_causal_lm_of(causal_lm_config("opt", *OPT_SHAPES[model])))
    return shape_of_model(empty_causal_lm(local_model(model)))


def shape_of_model(model: Any) -> Shape:
    """Of a causal language model of transformers. Raises UserError where its blocks are not
    alike.
    """
    config = model.config
    blocks = list(find_blocks(model).values())
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    if len(set(counts)) > 1:
        raise UserError(
            "the plan is for models whose blocks are alike; this one's are of several sizes"
        )
    heads = config.num_attention_heads
    return Shape(
        blocks=len(blocks),
        parameters=counts[0],
        matrix=sum(p.numel() for p in blocks[0].parameters() if p.ndim > 1),
        width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        resident=sum({id(p): p.numel() for p in model.parameters()}.values()) - sum(counts),
        head=model.get_output_embeddings().weight.numel(),
    )
