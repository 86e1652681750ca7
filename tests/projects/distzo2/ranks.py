"""What one rank of a test's launch does; test_ranks.py starts several with torchrun and compares
what they write.

torchrun --standalone --nproc-per-node 4 tests/projects/distzo2/ranks.py FOLDER
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from projects.distzo2 import DistZO2, Ranks, device_mesh, distributed  # noqa: E402
from projects.distzo2.engine import shared_engine  # noqa: E402
from projects.zo2 import ZO2  # noqa: E402
from shared.errors import UserError  # noqa: E402

STEPS = 24
DRAWS = 200
WIDTH = 7


class Block(nn.Module):
    """Sizes that are no multiples of 16 or of the number of ranks; a frozen part, and a buffer that
    scales.
    """

    def __init__(self, inner: int):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, inner),
            nn.Linear(inner, WIDTH, bias=False),
        )
        self.norm.bias.requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * self.scale


class Model(nn.Module):
    """Five inputs, three classes, a parameter of its own and one layer that two places use."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.entry = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block(11 + 34 * i) for i in range(4))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model()


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0].to(net.shift.dtype)), batch[1])


def batches(step: int, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of these sizes; the rows are the same however they are divided."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = (
        torch.randn(sum(sizes), 5, generator=generator),
        torch.randint(0, 3, (sum(sizes),), generator=generator),
    )
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def options(**more: Any) -> dict[str, Any]:
    return {
        "lr": lambda step: 2e-2 / (1 + step),
        "eps": 1e-2,
        "seed": 3,
        "weight_decay": 0.1,
        "loss": loss,
        "no_decay": ("norm",),
        **more,
    }


def digest(tensors: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# Of the options, these are the scenario's and not the engine's: a model in float64, the ranks in
# other places of the mesh, and the micro-batches in another order.
OWN = ("double", "places", "order")

# world size -> name -> (dp, pert, transfer, options of the engine, sizes of the micro-batches, by
# their rows or all alike)
SCENARIOS: dict[int, dict[str, tuple[int, int, str, dict[str, Any], list[int], bool]]] = {
    1: {"alone": (1, 1, "replicated", {}, [4, 4], False)},
    2: {
        "PertP": (1, 2, "replicated", {}, [4], False),
        "PertP, sliced": (1, 2, "sliced", {}, [4], False),
        "PertP, sliced, in turns": (1, 2, "sliced", {"overlap": False, "slots": 1}, [4], False),
        "PertP, fresh": (1, 2, "replicated", {"probe": "fresh"}, [4], False),
        "PertP, nothing away": (1, 2, "replicated", {"storage": None}, [4], False),
        "PertP, micro-batches": (1, 2, "replicated", {}, [2, 2], False),
        "PertP, roles exchanged": (1, 2, "replicated", {"places": [[1, 0]]}, [2, 2], False),
        "DDP, shares exchanged": (2, 1, "sliced", {"places": [[1], [0]]}, [4, 4], False),
        "DDP": (2, 1, "replicated", {}, [4, 4], False),
        "DDP, sliced": (2, 1, "sliced", {}, [4, 4], False),
        "DDP, uneven": (2, 1, "replicated", {}, [5, 2], True),
        "DDP, three micro-batches": (2, 1, "sliced", {}, [2, 2, 2], False),
        "DDP, one share is empty": (2, 1, "replicated", {}, [4], False),
    },
    3: {
        "DDP": (3, 1, "replicated", {}, [2, 2, 2], False),
        "DDP, sliced": (3, 1, "sliced", {}, [2, 2, 2], False),
        # sums of float32 losses are exact in any order
        "DDP, float64": (3, 1, "replicated", {"double": True}, [2, 2, 2], False),
        "DDP, other order": (3, 1, "replicated", {"order": [1, 2, 0]}, [2, 2, 2], False),
        "DDP, other order, float64": (
            3,
            1,
            "replicated",
            {"double": True, "order": [1, 2, 0]},
            [2, 2, 2],
            False,
        ),
    },
    4: {
        "DDP": (4, 1, "replicated", {}, [2, 2, 2, 2], False),
        "2D": (2, 2, "replicated", {}, [4, 4], False),
        "2D, sliced": (2, 2, "sliced", {}, [4, 4], False),
        "2D, all in other places": (2, 2, "sliced", {"places": [[2, 1], [0, 3]]}, [4, 4], False),
        "2D, uneven, sliced": (2, 2, "sliced", {}, [5, 1], True),
    },
}


def replica(more: dict[str, Any], ranks: Ranks | None = None) -> ZO2:
    """An engine with a host tier of its own."""
    net = model().double() if more.get("double") else model()
    return ZO2(
        net,
        forwards=ranks,
        **options(
            **{"storage": "ram", **{key: value for key, value in more.items() if key not in OWN}}
        ),
    )


def one_process(name: str, world: int) -> dict[str, Any]:
    """The same steps by ZO2 alone, which walks the micro-batches in order."""
    _, _, _, more, sizes, _ = SCENARIOS[world][name]
    engine = replica(more)
    steps = [engine.step(batches(step, sizes)) for step in range(STEPS)]
    return {
        "steps": [[one.loss.hex(), one.projected_gradient.hex()] for one in steps],
        "weights": digest(engine.tensors()),
    }


def run(name: str, world: int, folder: Path) -> dict[str, Any]:
    dp, pert, transfer, more, sizes, by_rows = SCENARIOS[world][name]
    mesh = (
        DeviceMesh("cpu", more["places"], mesh_dim_names=("dp", "pert"))
        if "places" in more
        else device_mesh(dp, pert)
    )
    if transfer == "sliced":
        own = {key: value for key, value in more.items() if key not in OWN}
        file = folder / f"{name}.safetensors".replace(", ", "-")
        engine = shared_engine(model, file, Ranks(mesh), **options(**own))
    else:
        engine = replica(more, Ranks(mesh))
    ddp = DistZO2(engine, transfer, check_every=5)
    weights = [float(size) for size in sizes] if by_rows else None
    order = more.get("order", range(len(sizes)))
    steps = [
        ddp.step([batches(step, sizes)[place] for place in order], weights) for step in range(STEPS)
    ]
    found: dict[str, Any] = {
        "steps": [[one.loss.hex(), one.projected_gradient.hex()] for one in steps]
    }
    traffic = engine.traffic
    found |= {"sent": ddp.ranks.bytes_sent, "exchanged": ddp.exchanged.total()}
    found |= {"up": traffic.bytes_up, "down": traffic.bytes_down}
    found |= {
        "uploads": [traffic.uploads[b] for b in range(4)],
        "offloads": [traffic.offloads[b] for b in range(4)],
    }
    found["weights"] = digest(engine.tensors())
    ddp.save(folder / f"{name}.out.safetensors".replace(", ", "-"))
    engine.close()
    return found


def at_rest(ranks: Ranks | None = None, **more: Any) -> ZO2:
    """An engine whose weights do not move: no learning rate, and no rounding from restoring."""
    return ZO2(
        model(),
        forwards=ranks,
        **options(**{"storage": "ram", "lr": 0.0, "weight_decay": 0.0, "probe": "fresh", **more}),
    )


def spread(world: int) -> list[str]:
    """Projected gradients of one direction at one point on many batches, each of a micro-batch a
    rank.
    """
    ddp = DistZO2(at_rest(Ranks(device_mesh(world))), check_every=0)
    return [
        ddp.step(batches(step, [2] * world), seed=7).projected_gradient.hex()
        for step in range(DRAWS)
    ]


def refusals(world: int, folder: Path) -> dict[str, str]:
    """What engines that differ are told, on this rank."""
    rank = dist.get_rank()
    found = {}

    def refused(name: str, work: Any) -> None:
        try:
            work()
            found[name] = "nothing"
        except UserError as error:
            found[name] = str(error)

    def engine(**more: Any) -> ZO2:
        chosen = options(**{"storage": "ram", "forwards": Ranks(mesh), **more})
        return ZO2(model(chosen.pop("of", 0)), **chosen)

    mesh = device_mesh(world)
    refused("alone", lambda: DistZO2(engine(forwards=None)))
    refused("seed", lambda: DistZO2(engine(seed=3 + rank)))
    refused("weights", lambda: DistZO2(engine(of=rank)))
    refused("eps", lambda: DistZO2(engine(eps=1e-2 if rank == 0 else 1e-3)))
    refused("ram sliced", lambda: DistZO2(engine(), "sliced"))
    refused("mesh", lambda: device_mesh(world + 1))
    refused("odd", lambda: device_mesh(1, 2))
    shared = folder / "one.safetensors"
    refused("one file", lambda: DistZO2(shared_engine(model, shared, Ranks(mesh), **options())))
    refused("transfer", lambda: DistZO2(engine(), "both"))

    def parted() -> None:
        # at rest: a bit that moves with the weights may be lost in the roundings of a step
        ddp = DistZO2(at_rest(Ranks(mesh)), check_every=2)
        for step in range(4):
            if step == 1 and rank == world - 1:  # one bit of one weight
                weight = ddp.engine.model.head.weight.data.view(-1)
                weight[3] = (
                    math.nextafter(float(weight[3]), math.inf)
                    if weight.dtype == torch.float64
                    else torch.nextafter(weight[3], torch.tensor(math.inf))
                )
            ddp.step(batches(step, [2] * world))

    refused("one bit", parted)

    def not_a_number() -> None:
        # fresh: restoring leaves no rounding
        ddp = DistZO2(engine(probe="fresh"), check_every=1)
        before = digest(ddp.engine.tensors())
        parts = batches(0, [2] * world)
        parts[-1] = (parts[-1][0] * math.nan, parts[-1][1])
        step = ddp.step(parts)
        assert step.skipped
        assert digest(ddp.engine.tensors()) == before
        ddp.step(parts, [1.0] * (world - 1) + [0.0])  # of weight 0: counts for nothing
        assert digest(ddp.engine.tensors()) != before
        raise UserError("as it should be")

    refused("NaN on one rank", not_a_number)
    refused("no batch", lambda: DistZO2(engine()).step([]))
    refused(
        "weights of nothing",
        lambda: DistZO2(engine()).step(batches(0, [2] * world), [0.0] * world),
    )
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed(timeout_seconds=60):
        rank, world = dist.get_rank(), dist.get_world_size()
        found: dict[str, Any] = {name: run(name, world, folder) for name in SCENARIOS[world]}
        if world == 3:
            found["refusals"] = refusals(world, folder)
        if world == 4:
            found["spread"] = spread(world)
        (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
