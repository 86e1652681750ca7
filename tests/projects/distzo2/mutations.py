"""Deliberate faults in DistZO2, each of which must turn the tests red.

python tests/projects/distzo2/mutations.py          # all; some minutes on two cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

ENGINE, ZO2, STORAGE = "projects/distzo2/engine.py", "projects/zo2/engine.py", "projects/zo2/storage.py"
RANKS = ("ranks",)

MUTATIONS = [
    Mutation(
        ZO2,
        '                    if self._visit is not None and self._visit.phase == "plus" and self.probe == "inplace":\n',
        "                    if False:\n",
        "a rank restores its weights by other roundings than its partner",
        RANKS,
    ),
    Mutation(
        ZO2,
        "        minus = self._lockstep.active >= self._plus\n",
        "        minus = self._lockstep.active >= self._streams // 2\n",
        "a rank sees the other perturbation of a shared parameter",
        RANKS,
    ),
    Mutation(
        ZO2,
        "                if self._plus == 0:\n                    self._minus()\n",
        "",
        "both ranks run the forward at theta + eps z",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "        for ranks in grid:  # in the order of the shares\n",
        "        for ranks in grid[::-1]:\n",
        "losses are added in another order",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "dtype=torch.float64, device=self.engine.device)\n        found = [torch.empty_like(own) for _ in range(self.world)]\n"
        "        dist.all_gather(found, own)\n        self.bytes_sent",
        "dtype=torch.float32, device=self.engine.device)\n        found = [torch.empty_like(own) for _ in range(self.world)]\n"
        "        dist.all_gather(found, own)\n        self.bytes_sent",
        "losses travel in float32",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "                if weight:  # 0 times what is not finite is not 0\n",
        "                if True:\n",
        "a micro-batch of weight 0 poisons the loss",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "        self._weights = own_weights + [0.0] * (size - len(own_weights))\n",
        "        self._weights = own_weights + [1.0] * (size - len(own_weights))\n",
        "an empty share counts",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "sums = [sums[0] + weight * a, sums[1] + weight * b, sums[2] + weight]",
        "sums = [sums[0] + a, sums[1] + b, sums[2] + 1]",
        "uneven shares weigh the same",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "self.rank in ranks:\n                group, file.part = made, (ranks.index(self.rank), len(ranks))",
        "self.rank in ranks:\n                group, file.part = made, ((ranks.index(self.rank) + 1) % len(ranks), len(ranks))",
        "a rank uploads one slice and puts it in the place of another",
        RANKS,
    ),
    Mutation(
        STORAGE,
        "return slice(min(self.part[0] * size, nbytes), min((self.part[0] + 1) * size, nbytes))",
        "return slice(0, nbytes)",
        "sliced ranks move whole blocks",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "        if self.check_every and self.engine.steps % self.check_every == 0:\n",
        "        if False:\n",
        "replicas that have parted go on",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "        self._same_engines()\n        if transfer",
        "        if transfer",
        "ranks with other seeds go on",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "        if any(len(ranks) > 1 for ranks in self._sharing(file)):\n",
        "        if False:\n",
        "replicas may write into one file",
        RANKS,
    ),
]


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "distzo2", sys.argv[1:]))
