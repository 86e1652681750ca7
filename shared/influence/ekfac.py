"""EK-FAC: the second moment of per-sample gradients in a Kronecker-factored eigenbasis (George et
al. 2018).

Per layer with per-sample weight gradients G = sum_t g_t a_t^T (a: inputs, g: gradients of the
outputs, t: positions): A = E[a a^T] and S = E[g g^T] have eigenbases U_A and U_S, and Lambda =
E[(U_S^T G U_A)^2] replaces the product of their eigenvalues. The layers' blocks are (U_S (x) U_A)
diag(Lambda) (U_S (x) U_A)^T; between layers there is nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.errors import UserError
from shared.influence.params import Parameters
from shared.influence.products import Data, Losses, chunks, note
from shared.influence.solvers import Info, Solved, relative_residual


@dataclass(frozen=True, eq=False)
class Block:
    """One layer: where its weight and bias lie in w, and its factors. O outputs, I inputs (one more
    with a bias).
    """

    weight: slice
    bias: slice | None
    u_s_OO: Tensor
    u_a_II: Tensor
    lambda_OI: Tensor
    damping: float

    def read(self, v: Tensor) -> Tensor:
        """The layer's part of v [p, k] as matrices [k, O, I]."""
        outputs = self.u_s_OO.shape[0]
        matrix = v[self.weight].T.reshape(v.shape[1], outputs, -1)
        return matrix if self.bias is None else torch.cat([matrix, v[self.bias].T.unsqueeze(2)], 2)

    def write(self, matrix: Tensor, out: Tensor) -> None:
        """The inverse of `read`, into out [p, k]."""
        if self.bias is not None:
            out[self.bias] = matrix[:, :, -1].T
            matrix = matrix[:, :, :-1]
        out[self.weight] = matrix.reshape(matrix.shape[0], -1).T

    def rotate(self, matrix: Tensor) -> Tensor:
        """U_S^T M U_A."""
        return self.u_s_OO.T @ matrix @ self.u_a_II

    def rotate_back(self, matrix: Tensor) -> Tensor:
        """U_S M U_A^T."""
        return self.u_s_OO @ matrix @ self.u_a_II.T


@dataclass(frozen=True, eq=False)
class EKFAC:
    """The approximation K + damping I of E[grad l grad l^T], block by block. Make it with
    `EKFAC.fit`.
    """

    blocks: tuple[Block, ...]
    size: int

    @classmethod
    def fit(
        cls,
        parameters: Parameters,
        w: Tensor,
        losses: Losses,
        data: Data,
        chunk: int | None = None,
        damping: float | None = None,
        l2: float = 0.0,
    ) -> "EKFAC":
        """Two passes over the data: the factors, then Lambda in their eigenbases.

        Args:
            losses: (w, data) -> [samples], through `parameters.call`. With labels drawn from the
                model (`draw_labels`) the result approximates the Fisher matrix, for cross-entropy
                the Gauss-Newton matrix; with the data's labels, the empirical Fisher.
            damping: added to Lambda; by default a tenth of each layer's mean Lambda.
            l2: weight of a regulariser, added besides.

        Raises:
            UserError: a selected parameter is not of a Linear or an ungrouped Conv2d with zero
                padding, or of one that is used twice.
        """
        recorded = Recorder(parameters, _layers(parameters), losses)
        note("per_sample_gradients")
        bases = {
            name: (torch.linalg.eigh(a)[1], torch.linalg.eigh(s)[1])
            for name, (a, s) in layer_moments(parameters, w, losses, data, chunk).items()
        }
        lambdas = {
            name: w.new_zeros(u_s.shape[0], u_a.shape[0]) for name, (u_a, u_s) in bases.items()
        }
        for piece in chunks(data, chunk):
            for name, (a_NTI, g_NTO) in recorded(w, piece).items():
                u_a, u_s = bases[name]
                rotated = torch.einsum("nto,nti->noi", g_NTO @ u_s, a_NTI @ u_a)
                lambdas[name] += rotated.square().sum(0) / data[0].shape[0]
        where = parameters.slices
        blocks = []
        for name, lambda_OI in lambdas.items():
            added = (0.1 * float(lambda_OI.mean()) if damping is None else damping) + l2
            if float(lambda_OI.min()) + added <= 0:
                raise UserError(f"EK-FAC of {name} is singular; use a damping above 0")
            bias = where.get(_join(name, "bias"))
            blocks.append(
                Block(
                    where[_join(name, "weight")],
                    bias,
                    bases[name][1],
                    bases[name][0],
                    lambda_OI,
                    added,
                )
            )
        return cls(tuple(blocks), parameters.size)

    def product(self, v: Tensor) -> Tensor:
        """(K + damping I) v: [p] -> [p], [p, k] -> [p, k]."""
        return self._apply(v, lambda block: block.lambda_OI + block.damping)

    def inverse(self, v: Tensor) -> Tensor:
        """(K + damping I)^-1 v; also what to give `cg` as its preconditioner."""
        return self._apply(v, lambda block: 1 / (block.lambda_OI + block.damping))

    def solve(self, b: Tensor) -> Solved:
        """As the solvers: (x, Info); the residual is that of EK-FAC's own matrix, not of the
        Hessian it stands for.
        """
        x = self.inverse(b)
        return x, Info("ekfac", relative_residual(self.product, x, b), 1, 1)

    def _apply(self, v: Tensor, factor: Callable[[Block], Tensor]) -> Tensor:
        columns = v if v.dim() == 2 else v.unsqueeze(1)
        out = torch.zeros_like(columns)
        for block in self.blocks:
            block.write(block.rotate_back(block.rotate(block.read(columns)) * factor(block)), out)
        return out.view_as(v)


def layer_moments(
    parameters: Parameters, w: Tensor, losses: Losses, data: Data, chunk: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every layer the second moments A = sum a a^T [I, I] of its inputs (with a 1 for a bias)
    and S = sum g g^T [O, O] of the gradients of its outputs, by the layer's name.

    Raises:
        UserError: as `EKFAC.fit`.
    """
    recorded = Recorder(parameters, _layers(parameters), losses)
    note("per_sample_gradients")
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for piece in chunks(data, chunk):
        for name, (a_NTI, g_NTO) in recorded(w, piece).items():
            a, g = a_NTI.flatten(0, 1), g_NTO.flatten(0, 1)
            now = (a.T @ a, g.T @ g)
            moments[name] = (
                (moments[name][0] + now[0], moments[name][1] + now[1]) if name in moments else now
            )
    return moments


def draw_labels(logits: Tensor, seed: torch.Generator) -> Tensor:
    """A class per row drawn from softmax(logits [n, c]): [n]. With them the second moment of
    gradients is the Fisher matrix.
    """
    return torch.multinomial(logits.detach().softmax(1), 1, generator=seed).squeeze(1)


# ---- layers --------------------------------------------------------------------------------------


def _linear(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [n, ..., I] and output gradients [n, ..., O] with their positions in one dimension."""
    n = inputs.shape[0]
    return inputs.reshape(n, -1, inputs.shape[-1]), outputs.reshape(n, -1, outputs.shape[-1])


def _conv2d(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution is a Linear on the patches of its input."""
    assert isinstance(layer, nn.Conv2d)
    assert not isinstance(layer.padding, str)
    patches = functional.unfold(
        inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    return patches.transpose(1, 2), outputs.flatten(2).transpose(1, 2)


RULES: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
}


def _layers(parameters: Parameters) -> dict[str, nn.Module]:
    """The layers whose weights are selected, by name. UserError for what no rule covers."""
    modules = dict(parameters.model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in parameters.names:
        owner, _, kind = name.rpartition(".")
        layer = modules[owner]
        covered = (
            type(layer) in RULES
            and kind in ("weight", "bias")
            and _join(owner, "weight") in parameters.names
        )
        if isinstance(layer, nn.Conv2d):
            covered = (
                covered
                and layer.groups == 1
                and layer.padding_mode == "zeros"
                and not isinstance(layer.padding, str)
            )
        if not covered:
            raise UserError(
                f"EK-FAC covers Linear and ungrouped Conv2d layers, not parameter {name} of a"
                f" {type(layer).__name__}; select without it"
            )
        found[owner] = layer
    return found


class Recorder:
    """Calls the losses with hooks on the layers: per layer, inputs (a 1 appended for a bias) and
    gradients of the outputs.
    """

    def __init__(self, parameters: Parameters, layers: dict[str, nn.Module], losses: Losses):
        self.parameters, self.layers, self.losses = parameters, layers, losses

    def __call__(self, w: Tensor, data: Data) -> dict[str, tuple[Tensor, Tensor]]:
        """For each layer a [samples, positions, I] and g [samples, positions, O]."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if name in seen:
                    raise UserError(
                        f"EK-FAC needs layers that are used once; {name} is used again in one"
                        " forward pass"
                    )
                seen[name] = (inputs[0].detach(), output)

            return keep

        handles = [layer.register_forward_hook(hook(name)) for name, layer in self.layers.items()]
        try:
            total = self.losses(w.detach().requires_grad_(), data).sum()
        finally:
            for handle in handles:
                handle.remove()
        unused = [name for name in self.layers if name not in seen]
        if unused:
            raise UserError(
                f"the losses do not use layer {unused[0]}; select parameters without it"
            )
        grads = torch.autograd.grad(total, [output for _, output in seen.values()])
        found = {}
        for (name, (inputs, _)), g in zip(seen.items(), grads, strict=True):
            a_NTI, g_NTO = RULES[type(self.layers[name])](self.layers[name], inputs, g)
            if _join(name, "bias") in self.parameters.names:
                a_NTI = torch.cat([a_NTI, torch.ones_like(a_NTI[..., :1])], -1)
            found[name] = (a_NTI, g_NTO)
        return found


def _join(owner: str, kind: str) -> str:
    return f"{owner}.{kind}" if owner else kind
