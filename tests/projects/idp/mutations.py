"""Mutations of IDP, each of which must turn the tests red.

    python tests/projects/idp/mutations.py          # all; some minutes on two cores
    python tests/projects/idp/mutations.py ridge    # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

RIDGE, CODEBOOK, NORMS, PSEUDO, ALIGN, CLASSIFY, GNN, STYLE, SOURCE, CLAIMS, PUBLISHED, EVALUATE = (
    f"projects/idp/{name}.py"
    for name in (
        *("ridge", "codebook", "norms", "pseudo", "align", "classify", "gnn", "style", "source"),
        *("claims", "published", "evaluate"),
    )
)

MUTATIONS = [
    Mutation(
        RIDGE,
        "return lam * rows / width",
        "return lam * width / rows",
        "the penalty falls with the rows of the codebook",
        ("ridge",),
    ),
    Mutation(
        RIDGE,
        "explained = (weights * (projected + penalty(rows, d, lam) * weights)).sum(-2)",
        "explained = (weights * projected).sum(-2)",
        "the ridge error of an image leaves the penalty's part out",
        ("ridge",),
    ),
    Mutation(
        RIDGE,
        "return (logits - low) / torch.where(span > 0, span, 1)",
        "return (logits - low) / span",
        "equal logits are divided by zero",
        ("ridge",),
    ),
    Mutation(
        RIDGE,
        "return float((s / (s + penalty(*codebook.shape, lam))).sum())",
        "return float((s.sqrt() / (s.sqrt() + penalty(*codebook.shape, lam))).sum())",
        "the effective dimension is of singular values, not of their squares",
        ("ridge",),
    ),
    Mutation(
        RIDGE,
        "exact = torch.promote_types(cells.dtype, torch.float32)\n    t, u",
        "exact = cells.dtype\n    t, u",
        "ridge solves in half precision",
        ("ridge",),
    ),
    Mutation(
        ALIGN,
        "return 0.1 / (1 + math.exp(step))",
        "return 0.1",
        "running statistics go on moving in every step",
        ("align",),
    ),
    Mutation(
        ALIGN,
        "logits.log_softmax(-1),\n                of_proxies.log_softmax(-1),",
        "of_proxies.log_softmax(-1),\n                logits.log_softmax(-1),",
        "the KL divergence is the other way round",
        ("align",),
    ),
    Mutation(
        ALIGN,
        "proxies = reconstruct(cells, codebook, how.lam)",
        "proxies = reconstruct(cells, codebook)",
        "the proxies' penalty is not the one that was asked for",
        ("align",),
    ),
    Mutation(
        ALIGN,
        "loss = task_losses(cells[:, n:], labels, books, codebook, scale, how).sum()",
        "loss = task_losses(cells[:, :n], labels[:, :n], books, codebook, scale, how).sum()",
        "the support is fitted and not the pseudo queries",
        ("align",),
    ),
    Mutation(
        NORMS,
        "self.network = copy.deepcopy(network).requires_grad_(False).eval()",
        "self.network = network.requires_grad_(False).eval()",
        "the source network itself is changed",
        ("align",),
    ),
    Mutation(
        NORMS,
        "return cells_of(maps.unflatten(0, (n, tasks)).transpose(0, 1))",
        "return cells_of(maps.unflatten(0, (tasks, n)))",
        "images of tasks are mixed up",
        ("align",),
    ),
    Mutation(
        NORMS,
        "return self.after(found.view(x.shape))",
        "return found.view(x.shape)",
        "the activation within timm's BatchNorm is lost",
        ("source",),
    ),
    Mutation(
        NORMS,
        "norm.requires_grad_(name in chosen)",
        "norm.requires_grad_(True)",
        "every BatchNorm layer is trained whatever the scope",
        ("align",),
    ),
    Mutation(
        PSEUDO,
        'generator=generator(seed, "pseudo", step)',
        'generator=generator(seeds[0], "pseudo", step)',
        "pseudo queries depend on who else is adapted",
        ("align",),
    ),
    Mutation(
        PSEUDO,
        "place = torch.arange(count, device=support.device) % shots",
        "place = torch.arange(count, device=support.device) % n",
        "pseudo queries are of another class's images",
        ("align",),
    ),
    Mutation(
        CLASSIFY,
        "adapted.set_momentum(0.0)",
        "adapted.set_momentum(0.1)",
        "queries move the running statistics",
        ("classify",),
    ),
    Mutation(
        CLASSIFY,
        'transductive = inference == "transductive"',
        "transductive = True",
        "inductive predictions depend on the batch",
        ("classify",),
    ),
    Mutation(
        CLASSIFY,
        "linked = linked | linked.mT",
        "linked = linked & linked.mT",
        "only mutual neighbours are linked in propagation",
        ("classify",),
    ),
    Mutation(
        CLASSIFY,
        "near = squares + torch.diag(squares.new_full((q,), torch.inf))",
        "near = squares",
        "a query is its own neighbour in propagation",
        ("classify",),
    ),
    Mutation(
        CODEBOOK,
        "books = cells.unflatten(1, (ways, -1)).flatten(2, 3)",
        "books = cells.unflatten(1, (-1, ways)).transpose(1, 2).flatten(2, 3)",
        "class codebooks take the cells of other classes",
        ("classify",),
    ),
    Mutation(
        CODEBOOK,
        "k = min(k, len(np.unique(values, axis=0)))",
        "k = k + 0",
        "repeated rows are clustered into more centres than there are",
        ("classify",),
    ),
    Mutation(
        GNN,
        "weights = logits.masked_fill(itself, -torch.inf).softmax(-1)",
        "weights = logits.softmax(-1)",
        "a node of the graph head is its own neighbour",
        ("source",),
    ),
    Mutation(
        GNN,
        "norm.training, norm.momentum = True, 0.0",
        "norm.training, norm.momentum = True, 0.1",
        "the graph head's statistics move in a test",
        ("source",),
    ),
    Mutation(
        STYLE,
        "spread = (cells - cells.mean((0, 1))).square().sum()",
        "spread = cells.square().sum()",
        "the spread of cells is not about their mean",
        ("source",),
    ),
    Mutation(
        SOURCE,
        'coins = generator(self.seed, "mirrored", number)',
        'coins = generator(self.seed + id(self), "mirrored", number)',
        "a resumed training mirrors other images",
        ("source",),
    ),
    Mutation(
        SOURCE,
        "falls = sum(number > round(share * self.epochs) for share in (4 / 7, 6 / 7))",
        "falls = 0",
        "the learning rate of the source never falls",
        ("source",),
    ),
    Mutation(
        PUBLISHED,
        "return dict(list(files.items())[3::4])",
        "return dict(list(files.items())[::4])",
        "novel classes of the published sets are the base ones",
        ("published",),
    ),
    Mutation(
        CLAIMS,
        "if count > null and count >= 4:",
        "if count >= 4:",
        "style between source and target needs no control",
        ("claims",),
    ),
    Mutation(
        CLAIMS,
        "elif above > below and above >= 0.25 * cells:",
        "elif above >= 0.25 * cells:",
        "a gain in as many cells as lose is partly one",
        ("claims",),
    ),
    Mutation(
        EVALUATE,
        '"fine_tuning": alignment(recipe, FINE_TUNING),\n        "idp": alignment(recipe)',
        '"fine_tuning": alignment(recipe),\n        "idp": alignment(recipe, FINE_TUNING)',
        "evaluate exchanges IDP and fine-tuning",
        ("commands",),
    ),
]

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "idp", sys.argv[1:]))
