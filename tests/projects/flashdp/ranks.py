"""One of several data-parallel ranks; test_distributed.py starts them. Writes what it saw to
`<folder>/<rank>.pt`.

python tests/projects/flashdp/ranks.py RANK WORLD FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from projects.flashdp import PoissonSampling, make_private  # noqa: E402

# rank r has samples parts[r] to parts[r + 1]
PARTS = {"uneven": (0, 2, 7), "one empty": (0, 0, 7), "all empty": (0, 0, 0)}
SEEDS: tuple[int | None, ...] = (5, None)


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 5, bias=False)
        )


def samples() -> torch.Tensor:
    return 3 * torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(1))


def train(
    part: str, sigma: float, seed: int | None, rank: int = 0, group: Any = None
) -> dict[str, Any]:
    """Two steps; a rank of a group takes its part of the samples, one process takes all. Ranks
    begin with different weights.
    """
    net = model(rank)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sampling = PoissonSampling(100, 3.5)
    dp = make_private(
        net,
        optimizer,
        sampling,
        noise_multiplier=sigma,
        clip=0.5,
        noise_seed=seed,
        process_group=group,
    )
    bounds = PARTS[part]
    mine = (
        samples()[bounds[rank] : bounds[rank + 1]] if group is not None else samples()[: bounds[-1]]
    )
    gradients, calls = [], []
    plain = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(tensor.numel())
        return plain(tensor, *arguments, **options)

    dist.all_reduce = counted
    try:
        for _ in range(2):
            optimizer.zero_grad()
            for rows in mine.split(3) if len(mine) else ():
                net(rows).square().sum().backward()
            optimizer.step()
            gradients.append([p.grad.clone() for p in net.parameters()])
    finally:
        dist.all_reduce = plain
    key = torch.tensor(list(dp._key), dtype=torch.uint8)
    return {
        "gradients": gradients,
        "weights": [p.detach().clone() for p in net.parameters()],
        "key": key,
        "elements": sum(calls),
    }


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    scenarios = (
        [(part, 0.0, 5) for part in PARTS]
        + [("uneven", 0.8, seed) for seed in SEEDS]
        + [("all empty", 0.8, 5)]
    )
    found = {repr(one): train(*one, rank=rank, group=dist.group.WORLD) for one in scenarios}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
