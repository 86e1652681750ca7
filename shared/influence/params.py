"""A model as a pure function of a flat vector of some of its parameters.

Knows modules and names; knows nothing of losses, data or influence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from shared.errors import UserError


@dataclass(frozen=True, eq=False)
class Parameters:
    """Some of a model's parameters as one vector w [p], in the order of `names`. Make it with
    `Parameters.of`.
    """

    model: nn.Module
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    # the other parameters and the buffers, as they were when this was made
    fixed: dict[str, Tensor] = field(repr=False)

    @classmethod
    def of(
        cls, model: nn.Module, select: str | Sequence[str] = "*", dtype: torch.dtype | None = None
    ) -> "Parameters":
        """Choose parameters by name.

        Args:
            select: one or more patterns as of a shell; one that begins with "!" takes names out
                again: "head.*", ("*", "!lm_head.weight").
            dtype: what to compute in, e.g. torch.float64; the model itself stays as it is. By
                default that of the chosen parameters.

        Raises:
            UserError: nothing is chosen, both names of a tied parameter are, the chosen are of
                several types, or the model is in a mode whose derivatives are random or wrong (see
                `refuse_train_mode`).
        """
        refuse_train_mode(model)
        select = (select,) if isinstance(select, str) else select
        named = dict(model.named_parameters(remove_duplicate=False))
        chosen = {name: value for name, value in named.items() if _matches(name, select)}
        if not chosen:
            known = ", ".join(list(named)[:5]) or "it has none"
            raise UserError(
                f"no parameter is called {' or '.join(select)}; the model's are"
                f" {known}{' ...' if len(named) > 5 else ''}"
            )
        first: dict[int, str] = {}
        for name, value in chosen.items():
            if id(value) in first:
                raise UserError(
                    f"parameters {first[id(value)]} and {name} are one tensor; select one, e.g. add"
                    f" the pattern '!{name}'"
                )
            first[id(value)] = name
        kinds = {value.dtype for value in chosen.values()}
        if dtype is None and len(kinds) > 1:
            raise UserError(
                f"the selected parameters are of types {', '.join(sorted(map(str, kinds)))}; name"
                " one as dtype"
            )
        dtype = dtype or kinds.pop()
        fixed: dict[str, Tensor] = {}
        # tied ones once: functional_call wants it so
        for name, other in [*model.named_parameters(), *model.named_buffers()]:
            if id(other) not in first:
                kept = other.detach().clone()
                fixed[name] = kept.to(dtype) if kept.is_floating_point() else kept
        return cls(
            model, tuple(chosen), tuple(value.shape for value in chosen.values()), dtype, fixed
        )

    @property
    def size(self) -> int:
        """p, how many numbers."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in w."""
        stops = torch.tensor([0, *(shape.numel() for shape in self.shapes)]).cumsum(0).tolist()
        return {name: slice(stops[i], stops[i + 1]) for i, name in enumerate(self.names)}

    def flat(self) -> Tensor:
        """w [p]: a copy of the model's present values."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return torch.cat([named[name].detach().to(self.dtype).reshape(-1) for name in self.names])

    def unflatten(self, w: Tensor) -> dict[str, Tensor]:
        """The parameters by name, as views of w [p]."""
        if w.shape != (self.size,):
            raise UserError(
                f"a vector of {self.size} parameters is needed, not one of shape {tuple(w.shape)}"
            )
        parts = w.split([shape.numel() for shape in self.shapes])
        return {
            name: part.view(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def call(self, w: Tensor, *inputs: Any, **options: Any) -> Any:
        """The model's output at w [p], everything else fixed. A pure function: it may be
        differentiated, vmapped and so on.
        """
        refuse_train_mode(self.model)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward mode
            return functional_call(self.model, {**self.fixed, **self.unflatten(w)}, inputs, options)

    def load(self, w: Tensor) -> None:
        """Write w [p] into the model, in the model's own dtype."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in self.unflatten(w).items():
                named[name].copy_(value)


def refuse_train_mode(model: nn.Module) -> None:
    """Raise UserError for a module whose output depends on chance or on the rest of the batch, or
    that changes when it is called.
    """
    for name, module in model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UserError(
                f"{what} normalises by statistics of its batch: call model.eval(), or use GroupNorm"
                " or LayerNorm"
            )
        if (
            isinstance(module, _InstanceNorm)
            and module.training
            and module.running_mean is not None
        ):
            raise UserError(f"{what} updates its running statistics: call model.eval()")
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0:
            raise UserError(f"{what} drops at random: call model.eval()")


def refuse_unseen_modes(parameters: Parameters, x: Tensor) -> None:
    """Raise UserError where outputs on x [samples, ...] differ from call to call, or with the
    samples beside.

    That is what functional dropout and functional batch norm do where they are told to train: no
    module has a mode that `refuse_train_mode` could see. Two samples or more are needed.
    """
    w, half = parameters.flat(), max(1, x.shape[0] // 2)
    with torch.no_grad():
        whole, again, part = (parameters.call(w, rows) for rows in (x, x, x[:half]))
    if not whole.isfinite().all():
        return  # what computes with them says so
    slack = torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
    if not float((whole - again).abs().max()) <= slack:
        raise UserError(
            "the model's outputs on the same samples differ from call to call: it draws at random,"
            " as functional dropout does; give it training=self.training"
        )
    if not float((whole[:half] - part).abs().max()) <= slack:
        raise UserError(
            "the model's output of a sample depends on the samples beside it, as with functional"
            " batch norm in training mode; give it training=self.training, or use GroupNorm"
        )


def refuse_wrong_third_derivatives(model: nn.Module) -> None:
    """Raise UserError for a module of whose kernel torch computes third derivatives wrongly without
    a word; for who takes a derivative of a Hessian product.

    Found in torch 2.13, forward and reverse, against finite differences: LayerNorm, and
    InstanceNorm and batch norm where they take the statistics of their input. First and second
    derivatives are right, as is all of GroupNorm, RMSNorm and batch norm in eval mode. The
    functions of torch.nn.functional have the same fault and cannot be seen here.
    """
    for name, module in model.named_modules():
        own_statistics = isinstance(module, _NormBase) and (
            module.training or module.running_mean is None
        )
        if own_statistics or isinstance(module, nn.LayerNorm):
            kind = type(module).__name__
            raise UserError(
                f"{name or 'the model'} ({kind}): torch's third derivatives of {kind} are wrong;"
                " use GroupNorm or RMSNorm"
            )


def _matches(name: str, select: Sequence[str]) -> bool:
    taken = any(fnmatchcase(name, pattern) for pattern in select if not pattern.startswith("!"))
    return taken and not any(
        fnmatchcase(name, pattern[1:]) for pattern in select if pattern.startswith("!")
    )
