"""Ridge reconstruction: proxies of a domain's cells from a codebook, and class scores by how well a
class's cells reconstruct an image's.

Feature rows are cells: an image's map [d, h, w] is r = h w rows of width d.

Legend: ...  any leading dimensions (tasks), m cells, n rows of a codebook, d width, q images,
r cells of an image, c classes.
"""

import torch
from torch import Tensor


def penalty(rows: int, width: int, lam: float = 1.0) -> float:
    """The ridge penalty, which grows with the codebook: lam * rows / width (the authors' rule)."""
    return lam * rows / width


def reconstruct(cells: Tensor, codebook: Tensor, lam: float = 1.0) -> Tensor:
    """P = T U' (U U' + penalty I)^-1 U, the rows of U that come nearest to each cell at the price
    of their weights: the intermediate domain proxies (section 3 of the paper, from a summary).

    By Cholesky on the smaller side (rows of U or its width, which give the same P), in float32 at
    least, as a solve in half precision is unsafe.

    Args:
        cells: T [..., m, d].
        codebook: U [..., n, d].
        lam: multiplier of the penalty, above 0.

    Returns:
        P [..., m, d] in the type of the cells.

    Raises:
        ValueError: widths differ, or lam is not above 0.
    """
    rows, width = codebook.shape[-2:]
    if cells.shape[-1] != width:
        raise ValueError(f"cells of width {cells.shape[-1]}, a codebook of width {width}")
    if not lam > 0:
        raise ValueError(f"lam must be above 0, not {lam}")
    exact = torch.promote_types(cells.dtype, torch.float32)
    t, u = cells.to(exact), codebook.to(exact)
    factor = _factor(u, lam)
    if rows <= width:
        weights = torch.cholesky_solve(u @ t.mT, factor)  # [..., n, m]
        found = weights.mT @ u
    else:  # push-through form: T U'U (U'U + penalty I)^-1
        found = torch.cholesky_solve(u.mT @ (u @ t.mT), factor).mT
    return found.to(cells.dtype)


def effective_dimension(codebook: Tensor, lam: float = 1.0) -> float:
    """df = sum of s^2 / (s^2 + penalty) over the singular values s of U [n, d]: how many directions
    of the width a reconstruction keeps. At df = d, a proxy is its target.
    """
    s = torch.linalg.svdvals(codebook.double()).square()
    return float((s / (s + penalty(*codebook.shape, lam))).sum())


def ridge_logits(cells: Tensor, class_codebooks: Tensor, lam: float = 1.0) -> Tensor:
    """Minus the mean squared error of each image's reconstruction from each class's cells.

    Args:
        cells: [..., q, r, d] of q images.
        class_codebooks: [..., c, n, d].

    Returns:
        [..., q, c]
    """
    q, r, d = cells.shape[-3:]
    rows = class_codebooks.shape[-2]
    exact = torch.promote_types(cells.dtype, torch.float32)
    x, v = cells.to(exact).flatten(-3, -2).unsqueeze(-3), class_codebooks.to(exact)
    if rows <= d:
        # With weights a = (V V' + penalty I)^-1 V x, the squared error is
        # |x|^2 - a.(V x) - penalty |a|^2: numbers of the size of the rows, not of the width.
        projected = v @ x.mT  # [..., c, n, q r]
        weights = torch.cholesky_solve(projected, _factor(v, lam))
        explained = (weights * (projected + penalty(rows, d, lam) * weights)).sum(-2)
        error = x.square().sum(-1) - explained
    else:
        error = (x - reconstruct(x.expand(*v.shape[:-2], q * r, d), v, lam)).square().sum(-1)
    return -error.unflatten(-1, (q, r)).mean(-1).mT.to(cells.dtype)


def _factor(codebook: Tensor, lam: float) -> Tensor:
    """Cholesky factor of the penalised Gram matrix of a codebook [..., n, d], on its smaller
    side.
    """
    rows, width = codebook.shape[-2:]
    small = codebook if rows <= width else codebook.mT
    eye = torch.eye(min(rows, width), dtype=codebook.dtype, device=codebook.device)
    return torch.linalg.cholesky(small @ small.mT + penalty(rows, width, lam) * eye)


def min_max(logits: Tensor) -> Tensor:
    """Each image's logits [..., c] scaled to 0..1 over the classes; 0 where all are equal."""
    low, high = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)
    span = high - low
    return (logits - low) / torch.where(span > 0, span, 1)
