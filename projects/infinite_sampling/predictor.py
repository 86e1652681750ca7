"""How long a completion will be, from its prompt and its first k tokens.

The paper's predictor is an encoder that classifies the remaining length from prompt and prefix
(BERT with a class per length, by its authors' public code); `BinnedTransformer` is that, small and
trained in place, with classes that are bins of lengths. The follow-up of the same authors looks at
the policy's own hidden states instead; `HiddenRidge` does. `Constant` and `Oracle` are the two
ends.

All completions of a group share their prompt, so that with k = 0 every predictor says the same of
all of them, and within a group there is nothing to schedule by. `evaluate` therefore reports
Kendall's tau within groups beside the pooled one.

A completion cut at its limit is *censored*: its remaining length is at least what was seen. It is
not an ordinary sample of that length.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.stats import kendalltau, norm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from projects.infinite_sampling.rollout import Completion, Prefixes
from projects.infinite_sampling.sampler import can_keep, prefix_features
from shared.seeding import step_seed

# tokens an encoder sees: the last ones, so that a long prompt loses its beginning and never the
# prefix
_WINDOW = 128


@dataclass(frozen=True)
class Lengths:
    """Examples to fit on: prefixes of unfinished completions, what remained of each, and whether
    that was cut short.
    """

    prefixes: Prefixes
    remaining: np.ndarray  # float64 [examples], tokens after the prefix, the end token counted
    censored: np.ndarray  # bool [examples]

    def __len__(self) -> int:
        return len(self.remaining)


class Fitted(Protocol):
    """A predictor that learns."""

    needs_hidden: bool

    def fit(self, lengths: Lengths) -> None:
        """Forget what was learnt, and learn from these."""

    def predict(self, prefixes: Prefixes) -> np.ndarray:
        """The tokens that remain, float64 [jobs]."""


def examples(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    prefix: int,
    model: Any = None,
    batch: int = 8,
) -> Lengths:
    """The completions longer than `prefix` as examples. With a model, also the features of
    `HiddenRidge`, `batch` rows at a time.
    """
    kept = [c for c in completions if len(c.tokens) > prefix]
    pairs = [(list(prompts[c.prompt]), c.tokens[:prefix]) for c in kept]
    hidden = _features(model, pairs, batch) if model is not None and kept else None
    prefixes = Prefixes(
        [p for p, _ in pairs], [t for _, t in pairs], [(c.prompt, c.index) for c in kept], hidden
    )
    remaining = np.array([len(c.tokens) - prefix for c in kept], dtype=np.float64)
    return Lengths(prefixes, remaining, np.array([c.finish == "length" for c in kept], dtype=bool))


@torch.no_grad()
def _features(model: Any, pairs: Sequence[tuple[list[int], list[int]]], batch: int) -> Tensor:
    """As the engine captures them: the state that produced the last token of the prefix beside that
    token's embedding (for an empty prefix, the prompt's last state and token).
    """
    found, seen, keeps = [], [], can_keep(model)
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    try:
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            rows = [(p + t)[:-1] if t else p for p, t in part]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            for place, row in enumerate(rows):
                ids[place, : len(row)] = torch.tensor(row)
            last = [len(row) - 1 for row in rows]
            # logits of a whole prompt would be large
            places = sorted(set(last)) if keeps else list(range(ids.shape[1]))
            wanted = {"logits_to_keep": torch.tensor(places)} if keeps else {}
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False, **wanted)
            states = seen.pop()[range(len(rows)), [places.index(place) for place in last]]
            found.append(prefix_features(model, states, [(p + t)[-1] for p, t in part]))
    finally:
        hook.remove()
    return torch.cat(found)


# ---- predictors ----------------------------------------------------------------------------------


class Constant:
    """The mean of what remained, whatever the prefix: no prediction."""

    needs_hidden = False

    def __init__(self) -> None:
        self.value = 1.0

    def fit(self, lengths: Lengths) -> None:
        """By the Kaplan-Meier estimate of the survival function, which takes censored lengths for
        what they are.
        """
        self.value = _kaplan_meier_mean(lengths.remaining, lengths.censored)

    def predict(self, prefixes: Prefixes) -> np.ndarray:
        return np.full(len(prefixes.tokens), self.value)


class Oracle:
    """Knows the length of each completion, by (prompt, index); for the limit of what prediction can
    bring.
    """

    needs_hidden = False

    def __init__(self, lengths: Mapping[tuple[int, int], int]) -> None:
        self.lengths = lengths

    def predict(self, prefixes: Prefixes) -> np.ndarray:
        return np.array(
            [
                self.lengths[job] - len(t)
                for job, t in zip(prefixes.jobs, prefixes.tokens, strict=True)
            ],
            dtype=np.float64,
        )


class HiddenRidge:
    """Ridge regression on the policy's hidden state. Censored lengths are replaced by their
    expectation given that they are longer, in turns with the fit (Schmee and Hahn 1979).
    """

    needs_hidden = True

    def __init__(self, penalty: float = 1.0, turns: int = 5) -> None:
        self.penalty, self.turns = penalty, turns
        self._fit: Any = None

    def fit(self, lengths: Lengths) -> None:
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        assert lengths.prefixes.hidden is not None
        features, censored = lengths.prefixes.hidden.double().numpy(), lengths.censored
        target = lengths.remaining.copy()
        for _ in range(self.turns if censored.any() else 1):
            self._fit = make_pipeline(StandardScaler(), Ridge(self.penalty)).fit(features, target)
            guess = self._fit.predict(features)
            free = ~censored if (~censored).any() else np.ones_like(censored)
            spread = max(float(np.sqrt(np.mean((target - guess)[free] ** 2))), 1e-6)
            above = (lengths.remaining - guess) / spread
            # The mean of a normal beyond a point; log functions, as both vanish far out.
            beyond = guess + spread * np.exp(norm.logpdf(above) - norm.logsf(above))
            target = np.where(censored, np.maximum(beyond, lengths.remaining), lengths.remaining)

    def predict(self, prefixes: Prefixes) -> np.ndarray:
        assert prefixes.hidden is not None
        return np.maximum(1.0, self._fit.predict(prefixes.hidden.double().numpy()))


class BinnedTransformer:
    """A small transformer encoder over prompt and prefix that classifies the remaining length: the
    paper's form.

    Bins are quantiles of the lengths it is fitted on. A censored example says only that its bin is
    its own or a later one, and its likelihood is the sum of theirs. The prediction is the mean over
    bins; `quantile` is for those who would rather be safe.

    Args:
        vocabulary: of the policy's tokenizer.
        bins: classes at most.
        seed: of weights and batches.
    """

    needs_hidden = False

    def __init__(
        self,
        vocabulary: int,
        bins: int = 24,
        width: int = 48,
        layers: int = 2,
        steps: int = 200,
        batch: int = 64,
        lr: float = 3e-3,
        seed: int = 0,
    ) -> None:
        self.vocabulary, self.bins, self.width, self.layers = vocabulary, bins, width, layers
        self.steps, self.batch, self.lr, self.seed = steps, batch, lr, seed
        self.edges = np.array([1.0])
        self.centres = torch.ones(1)
        self.model: _Encoder | None = None

    def fit(self, lengths: Lengths) -> None:
        known = lengths.remaining[~lengths.censored]
        known = known if len(known) else lengths.remaining
        # The first length of each bin; each distinct length is a bin of its own where there are
        # few.
        self.edges = np.unique(
            np.quantile(known, np.linspace(0, 1, self.bins + 1)[:-1], method="lower")
        )
        labels = np.clip(np.searchsorted(self.edges, lengths.remaining, side="right") - 1, 0, None)
        means = [
            known[b]
            if (b := np.searchsorted(self.edges, known, side="right") - 1 == i).any()
            else [e]
            for i, e in enumerate(self.edges)
        ]
        self.centres = torch.tensor([float(np.mean(m)) for m in means])
        torch_state = torch.get_rng_state()
        torch.manual_seed(step_seed(self.seed, "encoder"))
        self.model = _Encoder(self.vocabulary, self.width, self.layers, len(self.edges))
        torch.set_rng_state(torch_state)
        ids = _window(lengths.prefixes)
        target, censored = torch.from_numpy(labels), torch.from_numpy(lengths.censored)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps, pct_start=0.1
        )
        rng = np.random.default_rng(step_seed(self.seed, "batches"))
        with torch.enable_grad():
            for _ in range(self.steps):
                rows = torch.from_numpy(rng.integers(0, len(ids), min(self.batch, len(ids))))
                loss = _bin_loss(self.model(ids[rows]), target[rows], censored[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    def predict(self, prefixes: Prefixes) -> np.ndarray:
        found: np.ndarray = (self.chances(prefixes) @ self.centres.double()).numpy()
        return found

    def quantile(self, prefixes: Prefixes, level: float) -> np.ndarray:
        """The centre of the first bin up to which at least `level` of the probability lies."""
        first = (self.chances(prefixes).cumsum(-1) >= level - 1e-12).int().argmax(-1)
        return self.centres[first].numpy()

    @torch.no_grad()
    def chances(self, prefixes: Prefixes) -> Tensor:
        """Probabilities of the bins, float64 [jobs, bins]."""
        assert self.model is not None
        return torch.softmax(self.model(_window(prefixes)).double(), -1)


class Online:
    """A predictor that is fitted again on the last rollouts, since lengths drift as the policy
    learns.

    Args:
        of: the predictor.
        keep: examples it is fitted on, the newest.
        every: rollouts between fits; the first is after the first.
    """

    def __init__(
        self, of: Fitted, prefix: int, keep: int = 1024, every: int = 10, model: Any = None
    ) -> None:
        self.of, self.prefix, self.keep, self.every = of, prefix, keep, every
        self.needs_hidden = of.needs_hidden
        self._model = model
        self._seen: deque[Lengths] = deque()
        self._rollouts, self._fitted = 0, False

    def observe(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> None:
        """Learn of a rollout."""
        found = examples(
            prompts, completions, self.prefix, self._model if self.needs_hidden else None
        )
        self._rollouts += 1
        if len(found):
            self._seen.append(found)
        while len(self._seen) > 1 and sum(map(len, self._seen)) - len(self._seen[0]) >= self.keep:
            self._seen.popleft()
        if self._seen and (not self._fitted or self._rollouts % self.every == 0):
            self.of.fit(_joined(self._seen))
            self._fitted = True

    def predict(self, prefixes: Prefixes) -> np.ndarray:
        """Before the first rollout all are alike."""
        return self.of.predict(prefixes) if self._fitted else np.ones(len(prefixes.tokens))


class _Encoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, bins: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary + 1, width, padding_idx=vocabulary)
        self.places = nn.Embedding(_WINDOW, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, bins)
        self.padding = vocabulary

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [rows, bins] from token ids [rows, tokens], padded on the left with -1, so that
        places are counted from the end.
        """
        pad = ids < 0
        places = torch.arange(ids.shape[1] - 1, -1, -1)
        states = self.encoder(
            self.tokens(ids.masked_fill(pad, self.padding)) + self.places(places),
            src_key_padding_mask=pad,
        )
        logits: Tensor = self.head(states[:, -1])
        return logits


def _window(prefixes: Prefixes) -> Tensor:
    """Token ids [jobs, tokens], -1 where there is none."""
    rows = [(p + t)[-_WINDOW:] for p, t in zip(prefixes.prompts, prefixes.tokens, strict=True)]
    ids = torch.full((len(rows), max(map(len, rows))), -1, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, ids.shape[1] - len(row) :] = torch.tensor(row)
    return ids


def _bin_loss(logits: Tensor, target: Tensor, censored: Tensor) -> Tensor:
    """Mean negative log-likelihood: of the bin, or, censored, of this bin and all later ones."""
    exact = cross_entropy(logits, target, reduction="none")
    if not censored.any():
        return exact.mean()
    earlier = torch.arange(logits.shape[-1]) < target[:, None]
    later = torch.logsumexp(logits.masked_fill(earlier, -torch.inf), -1) - torch.logsumexp(
        logits, -1
    )
    return torch.where(censored, -later, exact).mean()


def _kaplan_meier_mean(remaining: np.ndarray, censored: np.ndarray) -> float:
    """The area under the survival curve, up to the largest length that was seen."""
    mean, survival, before = 0.0, 1.0, 0.0
    for length in np.unique(remaining):
        mean += survival * (length - before)
        survival *= 1 - np.sum((remaining == length) & ~censored) / np.sum(remaining >= length)
        before = float(length)
    return float(mean)


def _joined(seen: Sequence[Lengths]) -> Lengths:
    hidden = [one.prefixes.hidden for one in seen]
    prefixes = Prefixes(
        [p for one in seen for p in one.prefixes.prompts],
        [t for one in seen for t in one.prefixes.tokens],
        [j for one in seen for j in one.prefixes.jobs],
        None if any(h is None for h in hidden) else torch.cat([h for h in hidden if h is not None]),
    )
    return Lengths(
        prefixes,
        np.concatenate([one.remaining for one in seen]),
        np.concatenate([one.censored for one in seen]),
    )


# ---- how good ------------------------------------------------------------------------------------


def evaluate(predicted: np.ndarray, lengths: Lengths) -> dict[str, float]:
    """Errors of predictions of what remains: mean absolute error in tokens, SMAPE = mean of 2 |p -
    t| / (p + t), shares within 5 and 10 tokens, and Kendall's tau-b, over all (`pooled`) and as the
    mean over groups (`within`, 0 for a group whose predictions are all equal; groups in which all
    lengths are equal have nothing to order and are left out).
    """
    true = lengths.remaining
    error = np.abs(predicted - true)
    groups: dict[int, list[int]] = {}
    for place, (prompt, _) in enumerate(lengths.prefixes.jobs):
        groups.setdefault(prompt, []).append(place)
    taus = [_tau(predicted[g], true[g]) for g in groups.values() if len(set(true[g])) > 1]
    return {
        "error": float(error.mean()),
        "smape": float(np.mean(2 * error / (np.abs(predicted) + np.abs(true)))),
        "within_5": float(np.mean(error <= 5)),
        "within_10": float(np.mean(error <= 10)),
        "pooled": _tau(predicted, true),
        "within": float(np.mean(taus)) if taus else 0.0,
    }


def _tau(predicted: np.ndarray, true: np.ndarray) -> float:
    if len(set(predicted)) < 2 or len(set(true)) < 2:
        return 0.0
    return float(kendalltau(predicted, true).statistic)


PREDICTORS: dict[str, Callable[[int], Fitted]] = {
    "constant": lambda vocabulary: Constant(),
    "transformer": lambda vocabulary: BinnedTransformer(vocabulary),
    "ridge": lambda vocabulary: HiddenRidge(),
}
