"""`plan`: what the cost model predicts for the user's model on so many GPUs, before any is
rented.
"""

import argparse

from rich.console import Console
from rich.table import Table

from projects.distzo2.cost_model import COMPUTE_SHARE, LINK_SHARE, Plan, busiest, gpu_rates
from projects.distzo2.labels import DDP, PERTP, TWO_D
from projects.distzo2.shapes import shape_of
from shared.errors import UserError
from shared.tables import human_bytes

ITEMSIZE = 2  # float16


def meshes(gpus: int) -> dict[str, tuple[int, int]]:
    """The modes that so many GPUs can be in: data-parallel ranks, and ranks for the two perturbed
    forwards.
    """
    found = {DDP: (gpus, 1)} if gpus > 1 else {}
    if gpus % 2 == 0:
        found[PERTP if gpus == 2 else TWO_D] = (gpus // 2, 2)
    return found


def plan(options: argparse.Namespace) -> int:
    """Print the predictions. Returns the exit status."""
    shape = shape_of(options.model)
    batches = [(1, options.tokens)] * (options.batch or options.gpus)
    given = {"host_link": options.host_link, "exchange": options.exchange}
    alone = Plan().tokens_per_second(shape, gpu_rates(options.gpu, 1, **given), batches, ITEMSIZE)
    if options.links is not None and options.links > options.gpus:
        raise UserError(
            f"--links {options.links}: there are {options.gpus} GPUs; leave it out for a link each"
        )
    rates = gpu_rates(options.gpu, options.gpus, links=options.links, **given)
    plans = [("ZO2", Plan())]
    plans += [
        (mode, Plan(*mesh, transfer))
        for mode, mesh in meshes(options.gpus).items()
        for transfer in ("replicated", "sliced")
    ]  # type: ignore[arg-type]
    table = Table(
        "mode",
        "transfer",
        "tokens/s",
        "speed-up",
        "up a step",
        "exchanged",
        "device",
        "busiest lane",
        header_style="bold",
    )
    for mode, one in plans:
        own = rates if one.ranks > 1 else gpu_rates(options.gpu, 1, **given)
        speed = one.tokens_per_second(shape, own, batches, ITEMSIZE)
        moved = [
            one.host_bytes(shape, ITEMSIZE),
            one.exchanged_bytes(shape, ITEMSIZE),
            one.device_bytes(shape, ITEMSIZE, own.draws),
        ]
        cells = [
            mode,
            one.transfer if one.ranks > 1 else "",
            f"{speed:,.0f}",
            f"{speed / alone:.2f}",
            *map(human_bytes, moved),
        ]
        table.add_row(*cells, busiest(one.lanes(shape, own, batches, ITEMSIZE), shape.blocks))
    console = Console(highlight=False)
    console.print(table)
    links = (
        "a link to the host each"
        if options.links is None
        else f"{options.links} link(s) to the host for all"
    )
    console.print(
        f"Predictions, not measurements: {len(batches)} sequences of {options.tokens} tokens a step"
        " in float16. Bytes are a rank's; on the device those of weights and buffers, and"
        f" activations and logits come on top. Assumed: {COMPUTE_SHARE:.0%} of {options.gpu}'s peak"
        f" rate of products, {LINK_SHARE:.0%} of those of memory and links, {links}; every rank"
        " draws all noise and updates all weights.",
        markup=False,
    )
    return 0
