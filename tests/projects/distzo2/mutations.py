"""Deliberate faults in DistZO2, each of which must turn the tests red.

python tests/projects/distzo2/mutations.py          # all; some minutes on two cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

ENGINE, ZO2, STORAGE = (
    "projects/distzo2/engine.py",
    "projects/zo2/engine.py",
    "projects/zo2/storage.py",
)
COST, MESHES, TABLES = (
    "projects/distzo2/cost_model.py",
    "projects/distzo2/meshes.py",
    "projects/distzo2/tables.py",
)
CLAIMS, LAUNCH, RANK = (
    "projects/distzo2/claims.py",
    "projects/distzo2/experiments/_launch.py",
    "projects/distzo2/experiments/_ranks.py",
)
TASKS, PLAN = "projects/distzo2/experiments/_tasks.py", "projects/distzo2/plan.py"
RANKS, MODEL, ROWS, RUNS = ("ranks",), ("cost_model",), ("claims",), ("experiments",)

MUTATIONS = [
    Mutation(
        ZO2,
        '                        and self._visit.phase == "plus"\n',
        "                        and False\n",
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
        "dtype=torch.float64, device=wire())\n        found = [torch.empty_like(own) for _ in"
        " range(self.world)]\n        dist.all_gather(found, own)\n        self.bytes_sent",
        "dtype=torch.float32, device=wire())\n        found = [torch.empty_like(own) for _ in"
        " range(self.world)]\n        dist.all_gather(found, own)\n        self.bytes_sent",
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
        "self.rank in ranks:\n                group, file.part = made, (ranks.index(self.rank),"
        " len(ranks))",
        "self.rank in ranks:\n                group, file.part = made, ((ranks.index(self.rank) +"
        " 1) % len(ranks), len(ranks))",
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
    Mutation(
        ENGINE,
        "        self.share, self.role = place\n",
        '        self.share, self.role = place[0], mesh.get_local_rank("pert")\n',
        "a rank takes its place among sorted ranks for its role",
        RANKS,
    ),
    Mutation(
        ENGINE,
        "            of_plus, of_minus, weights = found[ranks[0]][0], found[ranks[-1]][1],"
        " found[ranks[0]][2]\n",
        "            of_plus, of_minus, weights = found[min(ranks)][0], found[max(ranks)][1],"
        " found[ranks[0]][2]\n",
        "the lower rank is taken for the one at theta + eps z",
        RANKS,
    ),
    Mutation(
        MESHES,
        '"nccl" if ranks <= count else "gloo"',
        '"nccl"',
        "ranks that share a GPU speak by NCCL",
        RUNS,
    ),
    Mutation(
        MESHES,
        'torch.device("cuda", rank % count)',
        'torch.device("cuda", rank)',
        "a rank wants a GPU that is not there",
        RUNS,
    ),
    Mutation(
        COST,
        "4.0 * self.width * rows * tokens**2",
        "2.0 * self.width * rows * tokens**2",
        "half of attention is not counted",
        MODEL,
    ),
    Mutation(COST, "if p.ndim > 1)", "if p.ndim > 0)", "norms and biases count as matrices", MODEL),
    Mutation(
        COST,
        "sum({id(p): p.numel() for p in model.parameters()}.values()) - sum(counts)",
        "sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False)) - sum(counts)",
        "tied weights count twice",
        MODEL,
    ),
    Mutation(
        COST,
        "return batches[: -(-len(batches) // self.dp)]",
        "return batches[: len(batches) // self.dp]",
        "the emptiest share sets the pace",
        MODEL,
    ),
    Mutation(
        COST,
        '"draws": float(draws * shape.blocks',
        '"draws": float(draws / self.pert * shape.blocks',
        "two ranks of PertP divide the noise",
        MODEL,
    ),
    Mutation(
        COST,
        "        forwards = sides * sum",
        "        forwards = 2 * sum",
        "a rank of PertP runs both forwards",
        MODEL,
    ),
    Mutation(
        COST,
        "            exchange=block_bytes * (1 - self.part)",
        "            exchange=block_bytes * self.part",
        "a rank takes only its own slice from the others",
        MODEL,
    ),
    Mutation(
        COST,
        'return 1 / self.ranks if self.transfer == "sliced" else 1.0',
        'return 1 / self.dp if self.transfer == "sliced" else 1.0',
        "ranks of one share do not divide the slices",
        MODEL,
    ),
    Mutation(
        COST,
        "after(compute, one - slots), after(offload, one - slots), ",
        "",
        "a slot takes a block before the last has left",
        MODEL,
    ),
    Mutation(
        COST,
        "        asked = max(after(begun, one - ahead), ",
        "        asked = max(",
        "uploads run ahead as far as there are slots",
        MODEL,
    ),
    Mutation(
        COST,
        "exchange.append(max(after(exchange, one - 1), upload[one])",
        "exchange.append(max(after(exchange, one - 1), 0.0)",
        "an exchange does not wait for its upload",
        MODEL,
    ),
    Mutation(
        COST, "            clock += lanes.outside\n", "", "nothing is outside the blocks", MODEL
    ),
    Mutation(
        COST,
        "    ahead = max(1, slots - 2)\n",
        "    ahead = max(1, slots - 1)\n",
        "the engine prefetches further than it does",
        MODEL,
    ),
    Mutation(
        COST,
        "crowd = max(1.0, ranks / links) if links else 1.0",
        "crowd = ranks / links if links else 1.0",
        "more links than ranks make a link faster",
        MODEL,
    ),
    Mutation(
        COST,
        "    found, _ = nnls(scaled / size, np.ones(len(seconds)))\n",
        "    found = np.linalg.lstsq(scaled[:, :2] / size[:2], np.ones(len(seconds)))[0].tolist() +"
        " [0.0]\n    found = np.array(found)\n",
        "calls cost nothing",
        MODEL,
    ),
    Mutation(
        COST,
        '(f"{lane}_busy_seconds", "min")',
        '(f"{lane}_busy_seconds", "max")',
        "waiting for the last rank counts as exchange",
        MODEL,
    ),
    Mutation(
        COST,
        '"repeat"], sort=False, as_index=False)["step_seconds"].max()',
        '"repeat"], sort=False, as_index=False)["step_seconds"].min()',
        "the faster rank is the step",
        MODEL,
    ),
    Mutation(
        COST,
        "host = plan.ranks / (1e9 *",
        "host = 1 / (1e9 *",
        "each rank has the emulated link to itself",
        MODEL,
    ),
    Mutation(
        COST,
        '("DDP, sliced" if plan.transfer == "sliced" else "DDP")',
        '"DDP"',
        "slices come out of memory and not out of a file",
        MODEL,
    ),
    Mutation(
        COST,
        "return compute / (compute + moving / ranks)",
        "return compute / (compute + moving)",
        "slicing changes nothing",
        MODEL,
    ),
    Mutation(
        PLAN,
        "    alone = Plan().tokens_per_second(shape, gpu_rates(options.gpu, 1, **given), batches,"
        " ITEMSIZE)\n",
        "    alone = Plan().tokens_per_second(shape, gpu_rates(options.gpu, 1, **given),"
        " batches[:1], ITEMSIZE)\n",
        "the command compares with another batch",
        MODEL,
    ),
    Mutation(
        TABLES,
        "np.mean(np.diff(steps) ** 2) / 2",
        "np.var(steps)",
        "a fall counts as roughness",
        ROWS,
    ),
    Mutation(
        TABLES,
        'rows[rows["kind"] == "step"].sort_values("step")["train_loss"].to_numpy(float)\n       '
        " tenth",
        'rows[rows["kind"] == "step"]["train_loss"].to_numpy(float)\n        tenth',
        "steps are taken in the order of the rows",
        ROWS,
    ),
    Mutation(
        TABLES,
        '    moving = float((rows["upload_share"] + rows["offload_share"]).mean())',
        '    moving = float((rows["upload_share"] + rows["offload_share"] +'
        ' rows["exchange_share"]).mean())',
        "exchange counts as the link to the host",
        ROWS,
    ),
    Mutation(
        CLAIMS,
        'mezo["test_accuracy"] > start["test_accuracy"] and',
        'mezo["test_accuracy"] >= start["test_accuracy"] and',
        "no progress is progress",
        ROWS,
    ),
    Mutation(
        CLAIMS,
        '(plan["gpus"] == 4) & (plan["links"] == "own") &',
        '(plan["gpus"] >= 4) &',
        "eight GPUs count as four",
        ROWS,
    ),
    Mutation(
        LAUNCH, "world if task in TIMED else 1", "1", "ranks are timed on a GPU they share", RUNS
    ),
    Mutation(
        RANK,
        "            losses = [ddp.step(batch, seed=number).loss",
        "            losses = [ddp.step(batch).loss",
        "ranks draw other noise than MeZO",
        RUNS,
    ),
    Mutation(
        TASKS,
        "parts[step * shares : (step + 1) * shares]",
        "parts[step : step + shares]",
        "global batches overlap",
        RUNS,
    ),
]


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "distzo2", sys.argv[1:]))
