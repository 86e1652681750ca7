"""What a model and an optimizer must be like before they are made private.

Privacy rests on two properties: every trainable parameter lies in a layer that has a rule for
per-sample gradients, and nothing mixes the samples of a batch. What breaks one of them is refused
by name, before the first step.
"""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from projects.flashdp import layers
from shared.errors import UserError


def covered(model: nn.Module) -> dict[str, tuple[nn.Module, type[nn.Module]]]:
    """The layers with trainable parameters and their private classes, by name; UserError for what
    has none.
    """
    owners: dict[int, str] = {}
    found: dict[str, tuple[nn.Module, type[nn.Module]]] = {}
    uncovered: list[str] = []
    modules: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, layers.Private):
            raise UserError("the model is private already; unwrap() it first")
        if mixes(module) and (module.training or any(p.requires_grad for p in module.parameters())):
            kind = (
                "BatchNorm"
                if isinstance(module, _BatchNorm)
                else f"{type(module).__name__} with running statistics"
            )
            raise UserError(
                f"{name} is a {kind}, which mixes the samples of a batch; use GroupNorm or"
                " LayerNorm, or freeze it in eval mode"
            )
        own = [(key, p) for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        if id(module) in modules:
            raise UserError(
                f"{modules[id(module)]} and {name} are one module in two places; give each its own,"
                " or freeze it"
            )
        modules[id(module)] = name
        for key, parameter in own:
            if id(parameter) in owners:
                raise UserError(
                    f"{owners[id(parameter)]} and {name}.{key} are tied; untie(model) gives each"
                    " its own, or freeze them"
                )
            owners[id(parameter)] = f"{name}.{key}"
        try:
            private = layers.private_class(module)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        narrow = [key for key, parameter in own if parameter.dtype.itemsize < 4]
        if narrow:
            raise UserError(
                f"{name}.{narrow[0]} is {own[0][1].dtype}, too narrow to add in; load in float32"
                " and use torch.autocast"
            )
        # weight_norm, for one
        if private is None or any(key not in ("weight", "bias") for key, _ in own):
            uncovered += [f"{name}.{key}".lstrip(".") for key, _ in own]
        else:
            found[name] = (module, private)
    if uncovered:
        more = f" and {len(uncovered) - 3} more" if len(uncovered) > 3 else ""
        raise UserError(
            f"no rule for per-sample gradients of {', '.join(uncovered[:3])}{more}; freeze them"
            " (requires_grad_(False)) or put them in Linear, Conv1D, Embedding, LayerNorm or"
            " RMSNorm layers"
        )
    if not found:
        raise UserError("the model has nothing to train: no parameter requires a gradient")
    return found


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """UserError unless the optimizer has the model's trainable parameters, all of them and no
    others.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    strangers = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad and id(p) not in names
    ]
    if strangers:
        raise UserError(
            f"the optimizer has {len(strangers)} trainable parameters that are not the model's"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for key, name in names.items() if key not in known]
    if missing:
        raise UserError(
            f"{len(missing)} trainable parameters are not in the optimizer, {missing[0]} among"
            " them; freeze them or add them"
        )


def check_unwrapped(model: nn.Module) -> None:
    """UserError for a model in a wrapper that adds gradients up on its own (or one that a wrapper
    calls): it would not see the clipped sums, and ranks would drift apart without a word.
    """
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, kinds) or nn.parallel.DistributedDataParallel._get_active_ddp_module():
        raise UserError(
            "DistributedDataParallel and DataParallel around a private model do not see its"
            " gradients; take the model out and give make_private the ranks: process_group="
            "torch.distributed.group.WORLD"
        )


def check_same_parameters(model: nn.Module, known: Mapping[str, nn.Parameter]) -> None:
    """UserError where a parameter is no longer the one that was made private.

    Args:
        known: by name, with all names of a parameter that has several.
    """
    now = dict(model.named_parameters(remove_duplicate=False))
    for name in known.keys() | now.keys():
        if now.get(name) is not known.get(name):
            other = next((n for n, p in known.items() if n != name and p is now.get(name)), None)
            what = f"has been tied to {other}" if other else "has been replaced"
            raise UserError(
                f"{name} {what} since make_private, which bounded it as a parameter of its own;"
                " unwrap() the model, change it, and make it private again"
            )


def mixes(module: nn.Module) -> bool:
    """Whether a module in training mode takes statistics over the samples, or keeps them in a
    buffer.
    """
    return isinstance(module, _BatchNorm) or bool(getattr(module, "track_running_stats", False))
