"""Mutations of ECIF, each of which must turn the tests red.

    python tests/projects/ecif/mutations.py          # all; some minutes on two cores
    python tests/projects/ecif/mutations.py score    # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

LOSS, PAIRS, INFLUENCE, TOWERS, FIT, SCORE, CLAIMS, FINETUNE, PICTURES, BASELINES, CLIP = (
    f"projects/ecif/{name}.py"
    for name in (
        *("loss", "pairs", "influence", "towers", "fit", "score", "claims"),
        *("finetune", "pictures", "baselines", "experiments/clip"),
    )
)

MUTATIONS = [
    Mutation(
        LOSS,
        'terms = (lambda x: -_log_others(x)) if mode == "exact" else (lambda x: x.softmax(-1))',
        'terms = (lambda x: -_log_others(x)) if mode == "exact" else (lambda x: 1 / x.softmax(-1))',
        "the negative part is the reciprocal of the softmax",
    ),
    Mutation(
        LOSS,
        "both = terms(masked) + terms(masked.mT)",
        "both = terms(masked) - terms(masked.mT)",
        "texts' softmaxes are subtracted",
    ),
    Mutation(
        LOSS,
        "return torch.where(others, both, 0.0).sum(-2)",
        "return torch.where(others, both, 0.0).sum(-1)",
        "a pair answers for its own softmax and not the others'",
    ),
    Mutation(
        LOSS,
        "found = found + torch.where(kept, terms, 0.0).sum(-1)",
        "found = found + torch.where(present, terms, 0.0).sum(-1)",
        "rows of pairs that go themselves are counted as negatives",
    ),
    Mutation(
        LOSS,
        "return torch.where(top, rest, torch.log1p(-small))",
        "return torch.log1p(-x.softmax(-1))",
        "the exact form loses its digits where a negative has all of the softmax",
    ),
    Mutation(
        LOSS,
        "    return s.masked_fill(~(present.unsqueeze(-1) & present.unsqueeze(-2)), ABSENT)",
        "    return s",
        "absent pairs are negatives all the same",
    ),
    Mutation(
        LOSS,
        "return x * (x.square().sum(-1, keepdim=True) + epsilon).rsqrt()",
        "return x / (x.square().sum(-1, keepdim=True).sqrt() + epsilon)",
        "the cosine is smoothed elsewhere",
    ),
    Mutation(
        INFLUENCE,
        "            total = total + grad(taken)(w)\n        return total / self.pairs.batches",
        "            total = total + grad(taken)(w)\n        return -total / self.pairs.batches",
        "removal has the wrong sign",
    ),
    Mutation(
        INFLUENCE,
        "return products.per_sample_dots(taken, w, data, s, self.chunk) / self.pairs.batches",
        "return products.per_sample_dots(taken, w, data, s, self.chunk) / self.pairs.n",
        "scores are scaled by pairs, not by batches",
    ),
    Mutation(
        INFLUENCE,
        "return removal_losses(self.towers.logits(at, piece[:-1]), piece[-1], mode, parts)\n\n     "
        "   return products",
        'return removal_losses(self.towers.logits(at, piece[:-1]), piece[-1], mode, "positive")\n\n'
        "        return products",
        "scores forget the negative part",
    ),
    Mutation(
        INFLUENCE,
        "    b_left = b - (b * along_a).sum(1, keepdim=True) * along_a",
        "    b_left = b",
        "relative influence counts a shared direction twice",
    ),
    Mutation(
        INFLUENCE,
        "independent = b_left.norm(dim=1, keepdim=True) > tolerance * b.norm(dim=1, keepdim=True)",
        "independent = b_left.norm(dim=1, keepdim=True) > -1",
        "a singular Gram matrix is not guarded",
    ),
    Mutation(
        PAIRS,
        "return Pairs(self.inputs, self.present & ~self.mask(removed), self.order)",
        "return Pairs(self.inputs, self.present, self.order)",
        "retraining keeps the removed pairs",
    ),
    Mutation(
        PAIRS,
        "return values.flatten(0, 1)[self.order]",
        "return values.flatten(0, 1)[: self.n]",
        "scores are in the order of places",
    ),
    Mutation(
        PAIRS,
        "filled[where], there[where] = shuffled, True",
        "filled[where], there[:] = shuffled, True",
        "a place that repeats a pair counts as one",
    ),
    Mutation(
        PAIRS,
        'np.random.default_rng(step_seed(seed, "batches", n))',
        'np.random.default_rng(step_seed(0, "batches", n))',
        "the partition ignores the seed",
    ),
    Mutation(
        PAIRS,
        "shuffled = shuffled[_by_label([apart[i] for i in shuffled])]",
        "shuffled = shuffled[_by_label(apart)]",
        "labels of other pairs are kept apart",
    ),
    Mutation(
        SCORE,
        "pairs = Pairs.of(tensors, recipe.batch, seed)",
        "pairs = Pairs.of(tensors, recipe.batch)",
        "the command's partition ignores the seed",
        ("refusals",),
    ),
    Mutation(
        SCORE,
        "return lambda w: pair_losses(problem.towers.logits(w, among), present)[0]",
        "return lambda w: pair_losses(problem.towers.logits(w, among), present).mean()",
        "a single query is scored by the mean of its batch",
        ("refusals",),
    ),
    Mutation(
        SCORE,
        "        check_company(pairs)\n",
        "",
        "a pair without negatives is ranked",
        ("refusals",),
    ),
    Mutation(
        SCORE,
        "write_scores(options.out, scores.mean(0).cpu().numpy(), columns)",
        "write_scores(options.out, scores[0].cpu().numpy(), columns)",
        "the first partition's scores are written for all",
        ("refusals",),
    ),
    Mutation(
        FIT,
        'moments = {f"{name}.weight": both for name, both in of_layers.items()}',
        "moments = {name: both for name, both in of_layers.items()}",
        "the leading directions of a layer are not found under its weight's name",
        ("refusals",),
    ),
    Mutation(
        FIT,
        "partial(galerkin, objective.hessian(w), basis=columns, damping=damping)",
        "partial(galerkin, objective.ggn(w), basis=columns, damping=damping)",
        "LoGra projects another matrix than the Hessian",
        ("refusals",),
    ),
    Mutation(
        CLAIMS,
        """    if gain.low <= 0:
        return Verdict("fails", measured)
    return Verdict(
        "holds" if inside""",
        """    return Verdict(
        "holds" if inside""",
        "an edit is close to retraining though no edit is as close",
        ("claims",),
    ),
    Mutation(
        TOWERS,
        "-self._logit_scale(w)",
        "self._logit_scale(w)",
        "CLIP's logit scale is taken for log tau",
        ("clip",),
    ),
    Mutation(
        FIT,
        "        require_positive(matrix.matmul, w, damping)\n",
        "",
        "an indefinite Hessian is not refused",
        ("refusals",),
    ),
    Mutation(
        SCORE,
        "        norm = check_trained(problem, w, work.gradient_tol)\n",
        "        norm = 0.0\n",
        "an untrained model is scored",
        ("refusals",),
    ),
    Mutation(
        SCORE,
        '        "recipe": recipe,\n',
        '        "recipe": None,\n',
        "chunks of other options are taken",
        ("refusals",),
    ),
    Mutation(
        CLAIMS,
        "return Verdict(_count(sum(gain.low > 0 for gain in gains.values()), len(gains)),"
        ' measured)\n\n\n@claim(\n    id="ecif.peers"',
        "return Verdict(_count(sum(gain.value > 0 for gain in gains.values()), len(gains)),"
        ' measured)\n\n\n@claim(\n    id="ecif.peers"',
        "a gain within its interval counts",
        ("claims",),
    ),
    Mutation(
        CLAIMS,
        "worse, means = sum(gain.high < 0 for gain in others)",
        "worse, means = sum(gain.value < 0 for gain in others)",
        "a peer's loss within its interval counts",
        ("claims",),
    ),
    Mutation(
        FINETUNE,
        "AdamW([w], lr=rate, weight_decay=0.0)",
        "AdamW([w], lr=rate)",
        "fine-tuning decays to 0 besides",
        ("finetune",),
    ),
    Mutation(
        FINETUNE,
        "problem.delta / (2 * pairs.batches) * (w - start)",
        "problem.delta / 2 * (w - start)",
        "a batch has the whole of the regulariser",
        ("finetune",),
    ),
    Mutation(
        FINETUNE,
        "added = damping * spectral_radius(",
        "added = damping / spectral_radius(",
        "the damping is no share",
        ("finetune",),
    ),
    Mutation(
        FINETUNE,
        "copy.deepcopy(base.model)",
        "base.model",
        "adapters of one seed stay for the next",
        ("finetune",),
    ),
    Mutation(
        TOWERS,
        "(pixels.to(dtype) / 255 - mean) / deviation",
        "(pixels.to(dtype) / 255 - mean)",
        "pixels are not scaled",
        ("finetune",),
    ),
    Mutation(
        INFLUENCE,
        "            total = total + grad(loss)(w)\n        return total /"
        " self.pairs.present.sum()",
        "            total = grad(loss)(w)\n        return total / self.pairs.present.sum()",
        "the validation gradient is of its last chunk",
        ("finetune",),
    ),
    Mutation(
        BASELINES,
        "return -regression * torch.sigmoid(-_margins(",
        "return -regression * torch.sigmoid(_margins(",
        "TRAK weighs pairs by what they have right",
        ("finetune",),
    ),
    Mutation(
        BASELINES,
        "pairs.data, chunk=1, l2=problem.delta / pairs.batches)",
        "pairs.data, chunk=1, l2=problem.delta)",
        "EK-FAC by rows takes the regulariser for every batch",
        ("finetune",),
    ),
    Mutation(
        PICTURES,
        "held, tests, order = known, order[:test], order[test:]",
        "held, tests, order = known, order[:test], order",
        "pictures are trained and tested on",
        ("pictures",),
    ),
    Mutation(
        CLIP,
        '"valuable": most_harmful(scores), "harmful": most_harmful(-scores)',
        '"valuable": most_harmful(-scores), "harmful": most_harmful(scores)',
        "the valuable are taken for the harmful",
        ("clip_experiment",),
    ),
    Mutation(
        CLIP,
        "lambda: train(self.problem.without(removed), self.start, self.config, self.seed)",
        "lambda: train(self.problem.without(removed), self.w, self.config, self.seed)",
        "retraining goes on from the full model",
        ("clip_experiment",),
    ),
    Mutation(
        CLIP,
        "            self.retrained[frozenset(removed)] = known\n",
        "",
        "a set of pairs is retrained without twice",
        ("clip_experiment",),
    ),
    Mutation(
        INFLUENCE,
        "    return Relative(span, _unit(a + b, floor) @ g)",
        "    return Relative(span, _unit(a + b, floor) @ g.flip(-1))",
        "the queries of relative influence change places",
    ),
]


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "ecif", sys.argv[1:]))
