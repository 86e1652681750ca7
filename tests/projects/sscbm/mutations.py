"""Mutations of SSCBM, each of which must turn the tests red.

    python tests/projects/sscbm/mutations.py           # all
    python tests/projects/sscbm/mutations.py pseudo    # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

PSEUDO, MODEL, TRAINING, INTERVENE, SALIENCY, METRICS, RELEASED, FITTING, CLAIMS, DATA, FOLDERS = (
    f"projects/sscbm/{name}.py"
    for name in (
        *("pseudo", "model", "training", "intervene", "saliency", "metrics", "released"),
        *("fitting", "claims", "data", "folders"),
    )
)
ANNOTATIONS = "projects/sscbm/annotations.py"

MUTATIONS = [
    Mutation(
        PSEUDO,
        "rows.append(candidates.gather(1, order[:, :k]))",
        "rows.append(order[:, :k])",
        "a neighbour is a place among candidates, not a row",
        ("pseudo",),
    ),
    Mutation(
        PSEUDO,
        "    return reciprocal / reciprocal.sum(1, keepdim=True)\n",
        "    return reciprocal / reciprocal.sum(1, keepdim=True) / distances.shape[1]\n",
        "weights are normalised twice",
        ("pseudo",),
    ),
    Mutation(
        PSEUDO,
        "        values = concepts[annotated][:, columns].double()[rows]",
        "        values = concepts[:, columns].double().nan_to_num()[rows]",
        "neighbours' numbers are taken for rows of the whole set",
        ("pseudo",),
    ),
    Mutation(
        PSEUDO,
        "        away = normalize(part.double(), dim=1).unsqueeze(1) - wide[candidates]",
        "        away = part.double().unsqueeze(1) - wide[candidates]",
        "distances see the length of features",
        ("pseudo",),
    ),
    Mutation(
        PSEUDO,
        "count = math.ceil(ratio * len(labels) / len(classes) - 1e-9)",
        "count = math.floor(ratio * len(labels) / len(classes) + 1e-9)",
        "the annotated images of a class are rounded down",
        ("pseudo",),
    ),
    Mutation(
        PSEUDO,
        'draw = labels.unique().tolist(), np.random.default_rng(step_seed(seed, "labelled"))',
        'draw = labels.unique().tolist(), np.random.default_rng(step_seed(0, "labelled"))',
        "the seed does not draw the annotated images",
        ("pseudo",),
    ),
    Mutation(
        PSEUDO,
        "candidates = candidates.sort(dim=1).values",
        "candidates = candidates.sort(dim=1, descending=True).values",
        "of equal neighbours the last comes first",
        ("pseudo",),
    ),
    Mutation(
        MODEL,
        "return p * positive + (1 - p) * negative, logits",
        "return p * negative + (1 - p) * positive, logits",
        "positive and negative embeddings change places",
    ),
    Mutation(
        MODEL,
        "p = replaced(logits.sigmoid(), given).unsqueeze(2)",
        "p = logits.sigmoid().unsqueeze(2)",
        "an expert is not heard",
    ),
    Mutation(
        MODEL,
        "places = self.place(found.movedim(1, 3)).movedim(3, 1)",
        "places = self.place(found.movedim(1, 3)).movedim(3, 1).transpose(2, 3)",
        "heat maps are transposed",
    ),
    Mutation(
        MODEL,
        "return normalize(mixed, dim=2), normalize(places, dim=1)",
        "return normalize(mixed, dim=2), places",
        "the cosine normalises one side",
    ),
    Mutation(
        TRAINING,
        "return concepts.masked_fill(~chosen.to(concepts.device), torch.nan)",
        "return concepts.nan_to_num(0.5).masked_fill(~chosen.to(concepts.device), torch.nan)",
        "RandInt tells images that are not annotated",
    ),
    Mutation(
        TRAINING,
        "return torch.where(cells, values, 0.0).sum() / cells.sum().clamp(min=1)",
        "return torch.where(cells, values, 0.0).sum() / cells.sum()",
        "an empty term is NaN",
    ),
    Mutation(
        TRAINING,
        '            bce(out.alignment, pseudo, reduction="none"), ~known',
        '            bce(out.alignment, pseudo, reduction="none"), torch.ones_like(known)',
        "annotated images are aligned as well",
    ),
    Mutation(
        TRAINING,
        "return labels.masked_fill(concepts.isnan().all(1), UNKNOWN)",
        "return labels",
        "classes of images that are not annotated are used",
    ),
    Mutation(
        TRAINING,
        "total = total + self.losses.lambda_1 * self.concept_loss(out, concepts, known)",
        "total = total + self.concept_loss(out, concepts, known)",
        "the weight of the concepts is ignored",
    ),
    Mutation(
        TRAINING,
        'draw = generator(self.seed, "randint", self.step)',
        'draw = generator(self.seed, "randint", 0)',
        "RandInt draws the same concepts at every step",
    ),
    Mutation(
        METRICS,
        "right = (probabilities > 0.5) == (concepts > 0.5)\n    return float(right[known]",
        "right = (probabilities > 0.5) == (concepts > 0.5)\n    return float(right",
        "concepts that are not annotated count",
    ),
    Mutation(
        METRICS,
        "told = None if given is None else given[rows].to(device)",
        "told = None if given is None else given[: len(images[rows])].to(device)",
        "every batch is told what the first one is",
        ("experiments",),
    ),
    Mutation(
        INTERVENE,
        "said.scatter_(1, order[:, :count], True)",
        "said[:, :count] = True",
        "all images are told the same groups",
        ("use",),
    ),
    Mutation(
        INTERVENE,
        "return by_group.argsort(dim=1, stable=True)",
        "return by_group.argsort(dim=1, stable=True, descending=True)",
        "the most certain group comes first",
        ("use",),
    ),
    Mutation(
        SALIENCY,
        "return 2 * (at[..., 0] >= height / 2).long() + (at[..., 1] >= width / 2).long()",
        "return 2 * (at[..., 1] >= width / 2).long() + (at[..., 0] >= height / 2).long()",
        "quadrants are counted by columns",
        ("use",),
    ),
    Mutation(
        SALIENCY,
        "return float(hits.nanmean(0).nanmean())",
        "return float(hits.nanmean())",
        "locations are averaged over pairs, not over concepts",
        ("use",),
    ),
    Mutation(
        RELEASED,
        "values = truth[places if index else annotated[places]]",
        "values = truth[annotated[places]]",
        "the first fault is mended",
        ("use",),
    ),
    Mutation(
        FITTING,
        "state: Mapping[str, Any] = model.state_dict(keep_vars=True)",
        "state: Mapping[str, Any] = dict(model.named_parameters())",
        "a resumed run forgets the means of batch norms",
        ("command",),
    ),
    Mutation(
        FITTING,
        "objective = Objective(model, losses, recipe.seed, done * a_epoch, weights)",
        "objective = Objective(model, losses, recipe.seed, 0, weights)",
        "a resumed run draws RandInt anew",
        ("command",),
    ),
    Mutation(
        ANNOTATIONS,
        "            if seen[file][:2] != (label, tuple(cells)):",
        "            if seen[file][0] != label:",
        "contradicting lines are taken for repeated ones",
        ("refusals",),
    ),
    Mutation(
        ANNOTATIONS,
        "        for kind in (annotated, ~annotated):",
        "        for kind in (annotated | ~annotated,):",
        "the split does not keep the share of annotations",
        ("refusals",),
    ),
    Mutation(
        FOLDERS,
        "np.nanmean(told[is_train & (labels == label)], axis=0) > 0.5",
        "np.nanmean(told[labels == label], axis=0) > 0.6",
        "test images have a say in a class's concepts",
        ("folders",),
    ),
    Mutation(
        CLAIMS,
        "_count(sum(gain.low > GAIN for gain in gains.values()), len(gains)),",
        "_count(sum(gain.value > 0 for gain in gains.values()), len(gains)),",
        "any gain over annotated images alone is enough",
        ("claims",),
    ),
]


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "sscbm", sys.argv[1:]))
