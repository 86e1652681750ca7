"""The ranks of a mesh, and what they say to one another: losses, and digests of what must be alike.

A rank stands at (d, role). Data parallelism: the ranks of one d evaluate the d-th share of the
batch. Perturbation parallelism: of those two, one runs the forward at theta + eps z and the other
that at theta - eps z. All losses are gathered in float64 and added in the order of the shares on
every rank, so that all find the same projected gradient.

A `Ranks` is what ZO2 asks about the forwards of a step (`projects.zo2.forwards.Forwards`). It knows
nothing of the engine's weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from projects.distzo2.meshes import NAMES
from projects.zo2.forwards import Side
from shared.errors import UserError


class Ranks:
    """This rank's place in the mesh.

    Args:
        mesh: of `meshes.device_mesh`, over all ranks.

    Attributes:
        mesh: the mesh.
        rank, world: of how many ranks this is which.
        shares, share: of how many shares of the batch this rank evaluates which.
        sides: the forwards that it runs.
        bytes_sent: of losses, by this rank.

    Raises UserError for another mesh.
    """

    def __init__(self, mesh: DeviceMesh):
        if mesh.mesh_dim_names != NAMES or mesh.size() != dist.get_world_size():
            raise UserError("the mesh must be one of device_mesh(dp, pert), over all ranks")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.shares = mesh.size(0)
        # get_local_rank would be the place in a group, whose ranks are sorted
        place = mesh.get_coordinate()
        assert place is not None
        self.share, self.role = place
        self.sides: tuple[Side, ...] = (
            (("plus",), ("minus",))[self.role] if mesh.size(1) == 2 else ("plus", "minus")
        )
        self.bytes_sent = 0
        self.mesh = mesh
        self._grid = mesh.mesh.tolist()
        self._weights: list[float] = []

    def take(self, batch: Sequence[Any], weights: Sequence[float]) -> list[Any]:
        """The micro-batches of this rank's share; their weights count at the next `agree`.

        Where there are fewer micro-batches than shares, the shares left over repeat the first with
        weight 0: all ranks must walk the blocks together.
        """
        size = -(-len(batch) // self.shares)
        mine = slice(self.share * size, (self.share + 1) * size)
        own, own_weights = list(batch[mine]), list(weights[mine])
        own += [batch[0]] * (size - len(own))
        self._weights = own_weights + [0.0] * (size - len(own_weights))
        return own

    def agree(self, plus: list[float], minus: list[float]) -> tuple[float, float]:
        """Losses of this rank's micro-batches -> those of the whole batch, the same bits on all
        ranks.

        24 bytes a micro-batch leave each rank: two losses (0 for the one that another rank runs)
        and a weight.
        """
        size = len(self._weights)
        own = torch.tensor(
            [plus or [0.0] * size, minus or [0.0] * size, self._weights],
            dtype=torch.float64,
        )
        told = self.gather(own)
        self.bytes_sent += own.nbytes
        sums = [0.0, 0.0, 0.0]
        for ranks in self._grid:  # in the order of the shares
            of_plus, of_minus, weights = told[ranks[0]][0], told[ranks[-1]][1], told[ranks[0]][2]
            for a, b, weight in zip(
                of_plus.tolist(), of_minus.tolist(), weights.tolist(), strict=True
            ):
                if weight:  # 0 times what is not finite is not 0
                    sums = [sums[0] + weight * a, sums[1] + weight * b, sums[2] + weight]
        return sums[0] / sums[2], sums[1] / sums[2]

    def gather(self, own: Tensor) -> list[Tensor]:
        """A tensor of the host's, of the same shape, from each rank, in order; all ranks call
        it.
        """
        told = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(told, own)
        return told

    def must_agree(self, digests: Mapping[str, bytes], what: str) -> None:
        """Eight bytes a digest from each rank; UserError, on all, where one is not rank 0's.

        Args:
            what: how the error begins.
        """
        own = torch.tensor([list(digest[:8]) for digest in digests.values()], dtype=torch.uint8)
        told = self.gather(own)
        for rank, theirs in enumerate(told):
            for name, a, b in zip(digests, theirs, told[0], strict=True):
                if not torch.equal(a, b):
                    raise UserError(f"{what}: {name} of rank {rank} differs from rank 0's")
