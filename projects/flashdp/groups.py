"""Clip groups: which parameters are clipped together, each to its own bound.

Notation: clip group l with bound C_l; sensitivity Δ = sqrt(Σ_l C_l²).
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shared.errors import UserError


def parameter_name(layer: str, key: str) -> str:
    """As in `named_parameters`; a model that is itself a layer has no name."""
    return f"{layer}.{key}" if layer else key


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters clipped together: a layer's, or a single one."""

    name: str
    bound: float
    parameters: list[str]
    noise: float  # standard deviation of the noise on the sum
    # of the samples of each backward since the last step
    norms: list[Tensor] = field(default_factory=list)


def clip_bounds(
    found: Mapping[str, Any], clip: float | Mapping[str, float], kind: str
) -> dict[str, tuple[list[str], float]]:
    """The parameters and the bound of each clip group, by its name."""
    members: dict[str, list[str]] = {}
    for name, (layer, _) in found.items():
        own = [
            parameter_name(name, key)
            for key, p in layer.named_parameters(recurse=False)
            if p.requires_grad
        ]
        members.update({name: own} if kind == "layer" else {one: [one] for one in own})
    if not isinstance(clip, Mapping):
        bounds = dict.fromkeys(members, float(clip) / math.sqrt(len(members)))
    else:
        matching = {
            name: [pattern for pattern in clip if fnmatch.fnmatchcase(name, pattern)]
            for name in members
        }
        unused = set(clip) - {pattern for patterns in matching.values() for pattern in patterns}
        if unused:
            raise UserError(
                f"no clip group is called '{sorted(unused)[0]}'; there are"
                f" {', '.join(list(members)[:3])}, ..."
            )
        bounds = {
            name: float(clip[patterns[0]]) if patterns else 0.0
            for name, patterns in matching.items()
        }
    for name, bound in bounds.items():
        if not 0 < bound < math.inf:
            raise UserError(f"the clipping bound of {name} must be a number above 0, not {bound:g}")
    return {name: (members[name], bounds[name]) for name in members}
