"""Mutations of DistZO2, each of which must turn the tests red.

python tests/projects/distzo2/mutations.py          # all; some minutes on two cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

ZO2_WALK = "projects/zo2/walk.py"
RANKS = "projects/distzo2/ranks.py"
SLICES = "projects/distzo2/slices.py"
ZO2_STORAGE = "projects/zo2/storage.py"
ENGINE = "projects/distzo2/engine.py"
MESHES = "projects/distzo2/meshes.py"
COST_MODEL = "projects/distzo2/cost_model.py"
SHAPES = "projects/distzo2/shapes.py"
PLAN = "projects/distzo2/plan.py"
TABLES = "projects/distzo2/tables.py"
CLAIMS = "projects/distzo2/claims.py"
COMMON = "projects/distzo2/experiments/common.py"
TRAINING = "projects/distzo2/experiments/training.py"
DATA = "projects/distzo2/data.py"
# test files
ON_RANKS, COST, CLAIMED, RUN = ("ranks",), ("cost_model",), ("claims",), ("experiments",)

MUTATIONS = [
    Mutation(
        ZO2_WALK,
        '                        and self.visit.phase == "plus"\n',
        "                        and False\n",
        "a rank restores its weights by other roundings than its partner",
        ON_RANKS,
    ),
    Mutation(
        ZO2_WALK,
        "        minus = self._lockstep.active >= self._plus\n",
        "        minus = self._lockstep.active >= self._streams // 2\n",
        "a rank sees the other perturbation of a shared parameter",
        ON_RANKS,
    ),
    Mutation(
        ZO2_WALK,
        """                if self._plus == 0:
                    self.minus()
""",
        "",
        "both ranks run the forward at theta + eps z",
        ON_RANKS,
    ),
    Mutation(
        RANKS,
        "        for ranks in self._grid:  # in the order of the shares\n",
        "        for ranks in self._grid[::-1]:\n",
        "losses are added in another order",
        ON_RANKS,
    ),
    Mutation(
        RANKS, "dtype=torch.float64", "dtype=torch.float32", "losses travel in float32", ON_RANKS
    ),
    Mutation(
        RANKS,
        "                if weight:  # 0 times what is not finite is not 0\n",
        "                if True:\n",
        "a micro-batch of weight 0 poisons the loss",
        ON_RANKS,
    ),
    Mutation(
        RANKS,
        "        self._weights = own_weights + [0.0] * (size - len(own_weights))\n",
        "        self._weights = own_weights + [1.0] * (size - len(own_weights))\n",
        "an empty share counts",
        ON_RANKS,
    ),
    Mutation(
        RANKS,
        "sums = [sums[0] + weight * a, sums[1] + weight * b, sums[2] + weight]",
        "sums = [sums[0] + a, sums[1] + b, sums[2] + 1]",
        "uneven shares weigh the same",
        ON_RANKS,
    ),
    Mutation(
        SLICES,
        "    engine.exchange_slices(place, count, complete)\n",
        "    engine.exchange_slices((place + 1) % count, count, complete)\n",
        "a rank uploads one slice and puts it in the place of another",
        ON_RANKS,
    ),
    Mutation(
        ZO2_STORAGE,
        "return slice(min(self.part[0] * size, nbytes), min((self.part[0] + 1) * size, nbytes))",
        "return slice(0, nbytes)",
        "sliced ranks move whole blocks",
        ON_RANKS,
    ),
    Mutation(
        ENGINE,
        "        if self.check_every and self.engine.steps % self.check_every == 0:\n",
        "        if False:\n",
        "replicas that have parted go on",
        ON_RANKS,
    ),
    Mutation(
        ENGINE,
        """        self._same_engines()
        self.exchanged""",
        "        self.exchanged",
        "ranks with other seeds go on",
        ON_RANKS,
    ),
    Mutation(
        SLICES,
        "    if any(len(sharing) > 1 for sharing in ranks_by_file(file, ranks)):\n",
        "    if False:\n",
        "replicas may write into one file",
        ON_RANKS,
    ),
    Mutation(
        RANKS,
        "        self.share, self.role = place\n",
        '        self.share, self.role = place[0], mesh.get_local_rank("pert")\n',
        "a rank takes its place among sorted ranks for its role",
        ON_RANKS,
    ),
    Mutation(
        RANKS,
        "of_plus, of_minus, weights = told[ranks[0]][0], told[ranks[-1]][1], told[ranks[0]][2]",
        "of_plus, of_minus, weights = told[min(ranks)][0], told[max(ranks)][1], told[ranks[0]][2]",
        "the lower rank is taken for the one at theta + eps z",
        ON_RANKS,
    ),
    Mutation(
        SLICES,
        'backend="nccl" if direct else "gloo"',
        'backend="nccl"',
        "ranks that share a GPU speak by NCCL",
        ("slices",),
    ),
    Mutation(
        SLICES,
        "return 0 not in told and len(set(told)) == len(told)",
        "return 0 not in told",
        "one GPU counts as two",
        ("slices",),
    ),
    Mutation(
        MESHES,
        'int(os.environ.get("LOCAL_RANK", "0")) % count',
        'int(os.environ.get("LOCAL_RANK", "0"))',
        "a rank wants a GPU that is not there",
        RUN,
    ),
    Mutation(
        COST_MODEL,
        "4.0 * self.width * rows * tokens**2",
        "2.0 * self.width * rows * tokens**2",
        "half of attention is not counted",
        COST,
    ),
    Mutation(
        SHAPES, "if p.ndim > 1)", "if p.ndim > 0)", "norms and biases count as matrices", COST
    ),
    Mutation(
        SHAPES,
        "sum({id(p): p.numel() for p in model.parameters()}.values()) - sum(counts)",
        "sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False)) - sum(counts)",
        "tied weights count twice",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "return batches[: -(-len(batches) // self.dp)]",
        "return batches[: len(batches) // self.dp]",
        "the emptiest share sets the pace",
        COST,
    ),
    Mutation(
        COST_MODEL,
        '"draws": float(draws * shape.blocks',
        '"draws": float(draws / self.pert * shape.blocks',
        "two ranks of PertP divide the noise",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "        forwards = sides * sum",
        "        forwards = 2 * sum",
        "a rank of PertP runs both forwards",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "            exchange=block_bytes * (1 - self.part)",
        "            exchange=block_bytes * self.part",
        "a rank takes only its own slice from the others",
        COST,
    ),
    Mutation(
        COST_MODEL,
        'return 1 / self.ranks if self.transfer == "sliced" else 1.0',
        'return 1 / self.dp if self.transfer == "sliced" else 1.0',
        "ranks of one share do not divide the slices",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "after(compute, one - slots), after(offload, one - slots), ",
        "",
        "a slot takes a block before the last has left",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "        asked = max(after(begun, one - ahead), ",
        "        asked = max(",
        "uploads run ahead as far as there are slots",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "exchange.append(max(after(exchange, one - 1), upload[one])",
        "exchange.append(max(after(exchange, one - 1), 0.0)",
        "an exchange does not wait for its upload",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "            clock += lanes.outside\n",
        "",
        "nothing is outside the blocks",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "    ahead = max(1, slots - 2)\n",
        "    ahead = max(1, slots - 1)\n",
        "the engine prefetches further than it does",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "crowd = max(1.0, ranks / links) if links else 1.0",
        "crowd = ranks / links if links else 1.0",
        "more links than ranks make a link faster",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "    found, _ = nnls(scaled / size, np.ones(len(seconds)))\n",
        "    found = np.linalg.lstsq(scaled[:, :2] / size[:2],"
        " np.ones(len(seconds)))[0].tolist() + [0.0]\n    found ="
        " np.array(found)\n",
        "calls cost nothing",
        COST,
    ),
    Mutation(
        COST_MODEL,
        '(f"{lane}_busy_seconds", "min")',
        '(f"{lane}_busy_seconds", "max")',
        "waiting for the last rank counts as exchange",
        COST,
    ),
    Mutation(
        COST_MODEL,
        '"repeat"], sort=False, as_index=False)["step_seconds"].max()',
        '"repeat"], sort=False, as_index=False)["step_seconds"].min()',
        "the faster rank is the step",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "host = plan.ranks / (1e9 *",
        "host = 1 / (1e9 *",
        "each rank has the emulated link to itself",
        COST,
    ),
    Mutation(
        COST_MODEL,
        '(DDP + SLICED if plan.transfer == "sliced" else DDP)',
        "DDP",
        "slices come out of memory and not out of a file",
        COST,
    ),
    Mutation(
        COST_MODEL,
        "return compute / (compute + moving / ranks)",
        "return compute / (compute + moving)",
        "slicing changes nothing",
        COST,
    ),
    Mutation(
        PLAN,
        "    alone = Plan().tokens_per_second(shape, gpu_rates(options.gpu, 1,"
        " **given), batches, ITEMSIZE)\n",
        "    alone = Plan().tokens_per_second(shape, gpu_rates(options.gpu, 1,"
        " **given), batches[:1], ITEMSIZE)\n",
        "the command compares with another batch",
        COST,
    ),
    Mutation(
        TABLES,
        "np.mean(np.diff(steps) ** 2) / 2",
        "np.var(steps)",
        "a fall counts as roughness",
        CLAIMED,
    ),
    Mutation(
        TABLES,
        """rows[rows["kind"] == "step"].sort_values("step")["train_loss"].to_numpy(float)
        tenth""",
        """rows[rows["kind"] == "step"]["train_loss"].to_numpy(float)
        tenth""",
        "steps are taken in the order of the rows",
        CLAIMED,
    ),
    Mutation(
        TABLES,
        '    moving = float((rows["upload_share"] + rows["offload_share"]).mean())',
        '    moving = float((rows["upload_share"] + rows["offload_share"] +'
        ' rows["exchange_share"]).mean())',
        "exchange counts as the link to the host",
        CLAIMED,
    ),
    Mutation(
        "projects/zo2/tables.py",
        "if not close or (seeds >= 5 and gained.low <= 0):",
        "if not close:",
        "models that have learnt nothing are as good as MeZO's",
        CLAIMED,
    ),
    Mutation(
        CLAIMS,
        '(plan["gpus"] == 4) & (plan["links"] == OWN_LINK) &',
        '(plan["gpus"] >= 4) &',
        "eight GPUs count as four",
        CLAIMED,
    ),
    Mutation(
        COMMON, "world if name in TIMED else 1", "1", "ranks are timed on a GPU they share", RUN
    ),
    Mutation(
        TRAINING,
        'ddp.step(batch, seed=noise_seed(config["seed"], number)).loss',
        "ddp.step(batch).loss",
        "ranks draw other noise than MeZO",
        RUN,
    ),
    Mutation(
        DATA,
        "parts[step * shares : (step + 1) * shares]",
        "parts[step : step + shares]",
        "global batches overlap",
        RUN,
    ),
]

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "distzo2", sys.argv[1:]))
