"""Which parts of a model visit the device, and which parameters they bring.

A *unit* is what ZO2 handles as one: an offloaded block, or a resident module outside the blocks (an
embedding, the final norm, the head). Units draw their noise in the order in which the forward
reaches them, and inside a unit in registration order (paper, section on the RNG state manager).
Parameters that more than one place uses (tied embeddings, a parameter owned by the model itself)
are *shared*: they draw noise once and keep both perturbed copies alive for the whole step.

This module only looks at the module tree. It knows nothing of storage, noise or steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from shared.errors import UserError


@dataclass(eq=False)
class Unit:
    """One module that is handled as a whole. `block` is its index among the offloaded blocks, or
    None when it is resident.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]  # full name -> trainable parameter, in registration order
    block: int | None = None
    # those that draw their noise here; known once the forward has run
    owned: dict[str, nn.Parameter] = field(default_factory=dict)


@dataclass
class Partition:
    """A model taken apart: `blocks` and `resident` units, and the parameters that are `shared`
    between places.
    """

    blocks: list[Unit]
    resident: list[Unit]
    root: dict[str, nn.Parameter]  # owned by a module that contains the blocks; they draw first
    shared: set[nn.Parameter]


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The blocks to offload, by full name: the children of the containers called `names`, or of the
    largest `ModuleList` or `Sequential`.

    Raises UserError when a name is unknown or when the model has no such container.
    """
    containers: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    if names is not None:
        for name in names:
            if name not in modules:
                raise UserError(
                    f"the model has no module '{name}'; its containers are:"
                    f" {', '.join(_containers(model)) or 'none'}"
                )
            containers[name] = modules[name]
    else:
        candidates = _containers(model)
        if not candidates:
            raise UserError(
                "the model has no ModuleList or Sequential that holds parameters; name the"
                " container with blocks=[...]"
            )
        largest = max(
            candidates, key=lambda name: sum(p.numel() for p in candidates[name].parameters())
        )
        containers[largest] = candidates[largest]
    blocks = {
        f"{prefix}.{child}" if prefix else child: module
        for prefix, container in containers.items()
        for child, module in container.named_children()
        if any(True for _ in module.parameters())
    }
    if not blocks:
        raise UserError(
            f"blocks={list(containers)}: nothing in there holds parameters; name a ModuleList or"
            " Sequential of layers"
        )
    return blocks


def _containers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost ModuleLists and Sequentials with parameters."""

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, nn.ModuleList | nn.Sequential):
            if any(True for _ in module.parameters()):
                yield prefix, module
            return
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}.{name}" if prefix else name)

    return dict(walk(model, ""))


def partition(
    model: nn.Module, blocks: Sequence[str] | None = None, shared: Sequence[str] = ()
) -> Partition:
    """Take `model` apart. `shared` names resident modules that one forward calls more than once.

    Raises UserError when blocks share parameters with each other or with the rest of the model: a
    block that is away cannot lend them.
    """
    block_modules = find_blocks(model, blocks)
    block_ids = {id(m) for m in block_modules.values()}
    holds_block = {id(m) for m in model.modules() if any(id(s) in block_ids for s in m.modules())}

    units: list[Unit] = []
    registered: dict[int, int] = {}  # how often a resident module stands in the tree
    root: dict[str, nn.Parameter] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        if id(module) in block_ids:
            return
        # a list or dict has no forward of its own
        if id(module) in holds_block or isinstance(module, nn.ModuleList | nn.ModuleDict):
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                if parameter.requires_grad:
                    root[name] = parameter
            # named_children would hide a module that is registered twice
            for name, child in module._modules.items():
                if child is not None:
                    walk(child, f"{prefix}.{name}" if prefix else name)
            return
        registered[id(module)] = registered.get(id(module), 0) + 1
        trainable = {n: p for n, p in module.named_parameters(prefix=prefix) if p.requires_grad}
        if trainable and registered[id(module)] == 1:
            units.append(Unit(prefix, module, trainable))

    walk(model, "")
    block_units = [
        Unit(
            name,
            module,
            {n: p for n, p in module.named_parameters(prefix=name) if p.requires_grad},
            index,
        )
        for index, (name, module) in enumerate(block_modules.items())
    ]

    unknown = set(shared) - {u.name for u in units}
    if unknown:
        raise UserError(
            f"shared={sorted(unknown)}: not a resident module; those are"
            f" {', '.join(u.name for u in units) or 'none'}"
        )
    users: dict[nn.Parameter, int] = {}
    for unit in units:
        weight = 2 if registered[id(unit.module)] > 1 or unit.name in shared else 1
        for parameter in unit.parameters.values():
            users[parameter] = users.get(parameter, 0) + weight
    owners: dict[int, str] = {}
    inside = {id(m) for b in block_modules.values() for m in b.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            owners.update({id(p): name or "the model" for p in module.parameters(recurse=False)})
    for name, module in block_modules.items():
        for parameter in module.parameters():
            if id(parameter) in owners:
                raise UserError(
                    f"block '{name}' shares a parameter with '{owners[id(parameter)]}': untie them,"
                    " or choose other blocks"
                )
            owners[id(parameter)] = name
    return Partition(
        block_units, units, root, {p for p, n in users.items() if n > 1} | set(root.values())
    )
