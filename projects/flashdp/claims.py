"""FlashDP's claims, each bound to a check over measured rows."""

import numpy as np
import pandas as pd

from projects.flashdp import labels
from projects.flashdp.tables import costs, mixed_precision, parallel_shares, speeds
from shared.claims import Verdict, claim
from shared.tables import human_bytes, paper_numbers

_HEADLINE = paper_numbers("flashdp", "headline").set_index("quantity")["value"]
_THROUGHPUT = _HEADLINE["share of non-private throughput"]
_MOVEMENT = _HEADLINE["saved memory movement (up to)"]
_REDUNDANT = _HEADLINE["saved redundant computation"]
UNKNOWN = "paper value not available"

BILLIONS = ("gpt2-xl", "llama-1b", "llama-3b", "llama-7b", "llama-13b")


@claim(
    id="flashdp.equal",
    claim=(
        "FlashDP trains exactly as standard per-layer DP-SGD does: the kernel changes the speed and"
        " not the algorithm."
    ),
    source="abstract (accuracy on par with standard per-layer-clipped DP-SGD)",
    bound=(
        "training losses within 1e-4 of those with all per-sample gradients formed (our own"
        " explicit clipping; tests compare with Opacus and with a backward per sample), over at"
        " least 100 steps, with the same noise"
    ),
    paper="on par",
    needs="rows of flashdp/utility",
)
def equal(utility: pd.DataFrame) -> Verdict:
    steps = utility[utility["kind"] == "step"]
    explicit = steps[steps["method"] == labels.EXPLICIT]
    keys = ["target_epsilon", "seed", "step"]
    pairs = explicit.merge(
        steps[steps["method"] == labels.FLASHDP], on=keys, suffixes=("_explicit", "_flash")
    )
    if pairs.empty or len(pairs) < len(explicit):
        return Verdict(
            "not tested here", "no run of FlashDP with the epsilon and the seed of an explicit one"
        )
    difference = (pairs["train_loss_flash"] / pairs["train_loss_explicit"] - 1).abs().max()
    length = int(pairs["step"].max()) + 1
    measured = f"largest relative difference of a loss {difference:.1e} over {length} steps"
    return Verdict(
        "fails" if difference > 1e-4 else "holds" if length >= 100 else "partly", measured
    )


@claim(
    id="flashdp.utility",
    claim="A larger privacy budget gives a better model, and none beyond what is spent is used.",
    source="appendix on utility",
    bound=(
        "held-out loss falls from each epsilon to the next larger one and to no privacy, by more"
        " than twice the standard error of its differences over at least 5 seeds, beginning with"
        " the untrained model's (epsilon 0); spent epsilon at most the target"
    ),
    paper=UNKNOWN,
    needs="rows of flashdp/utility",
)
def utility(utility: pd.DataFrame) -> Verdict:
    ends = utility[utility["kind"] == "end"]
    private = ends[ends["method"] == labels.FLASHDP]
    losses = private.pivot_table(index="seed", columns="target_epsilon", values="held_out_loss")
    epsilons = list(losses.columns)
    for method, place in ((labels.UNTRAINED, 0.0), (labels.NON_PRIVATE, np.inf)):
        rows = ends[ends["method"] == method].set_index("seed")["held_out_loss"]
        losses[place] = rows.reindex(losses.index)
    losses = losses[[0.0, *epsilons, np.inf]]
    overspent = bool((private["spent_epsilon"] > private["target_epsilon"]).any())
    falls = -losses.diff(axis=1).iloc[:, 1:]
    means = losses.mean()
    measured = (
        f"{means[0.0]:.3f} untrained, "
        + ", ".join(f"{means[epsilon]:.3f} at {epsilon:g}" for epsilon in epsilons)
        + f", {means[np.inf]:.3f} without privacy, {len(losses)} seeds"
    )
    if overspent:
        return Verdict("fails", measured + "; a run spent more than its target")
    if (means[np.inf] >= means[epsilons]).any() or means[epsilons].max() >= means[0.0]:
        return Verdict("fails", measured)
    if len(losses) < 5:
        return Verdict("partly", measured + "; too few seeds for an interval")
    clear = falls.mean() > 2 * falls.std() / np.sqrt(len(falls))
    smallest = (falls.mean() / (falls.std() / np.sqrt(len(falls)))).min()
    measured += f", the least clear step {smallest:.1f} standard errors"
    return Verdict("holds" if clear.all() else "partly", measured)


@claim(
    id="flashdp.throughput",
    claim="Private training reaches nearly the throughput of non-private training.",
    source="abstract",
    bound=(
        "at least 85 % in the geometric mean over the batch sizes, sequences of at least 128"
        " tokens; partly: at least 75 %"
    ),
    paper=f"{_THROUGHPUT:.0%} (Llama-13B on four A100)",
    needs="rows of flashdp/batch_size with sequences of at least 128 tokens",
)
def throughput(batch_size: pd.DataFrame) -> Verdict:
    flash = _long(batch_size, labels.FLASHDP)
    if flash.empty:
        return Verdict("not tested here", "no sequences of 128 tokens or more")
    mean = float(np.exp(np.log(flash["throughput_share"]).mean()))
    parts = ", ".join(
        f"{share:.0%} at {batch}"
        for batch, share in zip(flash["batch_size"], flash["throughput_share"], strict=True)
    )
    measured = f"{mean:.1%} ({parts}; {flash['tokens'].iloc[0]} tokens, noise included)"
    return Verdict("holds" if mean >= 0.85 else "partly" if mean >= 0.75 else "fails", measured)


@claim(
    id="flashdp.throughput_large",
    claim=(
        "On models of billions of parameters private training reaches nine tenths of the"
        " non-private throughput."
    ),
    source="abstract",
    bound=(
        "at least 90 % at 1024 tokens or more on a model of at least 0.9 billion parameters on"
        " a GPU"
    ),
    paper=f"{_THROUGHPUT:.0%} (Llama-13B on four A100)",
    needs="a GPU: rows of flashdp/batch_size at scale gpu or paper",
)
def throughput_large(batch_size: pd.DataFrame) -> Verdict:
    found = speeds(batch_size[batch_size["device"] == "cuda"])
    if len(found):
        found = found[
            found["model"].isin(BILLIONS)
            & (found["method"] == labels.FLASHDP)
            & (found["tokens"] >= 1024)
        ]
    if found.empty or found["throughput_share"].isna().all():
        return Verdict("not tested here", "no large model was trained on a GPU")
    shares = found["throughput_share"].dropna()
    return Verdict(
        (
            "holds"
            if shares.min() >= _THROUGHPUT
            else "partly"
            if shares.max() >= _THROUGHPUT
            else "fails"
        ),
        f"{shares.min():.1%} to {shares.max():.1%}",
    )


@claim(
    id="flashdp.memory",
    claim="Private training takes no more memory than non-private training.",
    source="abstract",
    bound=(
        "extra peak memory at most 1.05 times the non-private at a batch of 16 of a model of 20"
        " million parameters"
    ),
    paper="no additional memory",
    needs="rows of flashdp/memory for such a model",
)
def memory(memory: pd.DataFrame) -> Verdict:
    cell = memory[
        (memory["batch_size"] == 16) & memory["parameters"].between(15e6, 30e6)
    ].set_index("method")["peak_bytes"]
    if labels.FLASHDP not in cell or labels.NON_PRIVATE not in cell:
        return Verdict("not tested here", "no model of 20 million parameters at a batch of 16")
    ratio = cell[labels.FLASHDP] / cell[labels.NON_PRIVATE]
    others = [
        f"{name} {cell[name] / cell[labels.NON_PRIVATE]:.2f}x"
        for name in (labels.EXPLICIT, labels.OPACUS)
        if name in cell
    ]
    measured = (
        f"{ratio:.3f}x ({human_bytes(cell['FlashDP'])} and {human_bytes(cell[labels.NON_PRIVATE])};"
        f" {', '.join(others)})"
    )
    return Verdict("holds" if ratio <= 1.05 else "partly" if ratio <= 1.2 else "fails", measured)


@claim(
    id="flashdp.memory_batch",
    claim=(
        "What explicit methods take beyond FlashDP grows with the batch; FlashDP does not take a"
        " gradient a sample."
    ),
    source="motivation (per-sample gradients are a model's size for each sample)",
    bound=(
        "Opacus's peak over FlashDP's grows with each batch size of SmolLM2-135M, and FlashDP's"
        " slope is within 5 % of the parameters' bytes a sample of the non-private one"
    ),
    paper=UNKNOWN,
    needs="rows of flashdp/memory for one model at several batch sizes",
)
def memory_batch(memory: pd.DataFrame) -> Verdict:
    name = next(
        (n for n, rows in memory.groupby("model", sort=False) if rows["batch_size"].nunique() >= 3),
        None,
    )
    if name is None:
        return Verdict("not tested here", "no model at three batch sizes")
    rows = memory[memory["model"] == name]
    peaks = rows.pivot_table(index="batch_size", columns="method", values="peak_bytes").sort_index()
    ratios = peaks[labels.OPACUS] / peaks[labels.FLASHDP]
    slopes = (peaks.iloc[-1] - peaks.iloc[0]) / (peaks.index[-1] - peaks.index[0])
    excess = (slopes[labels.FLASHDP] - slopes[labels.NON_PRIVATE]) / (
        4 * rows["parameters"].iloc[0]
    )
    told = ", ".join(f"{ratio:.2f}x at {batch}" for batch, ratio in ratios.items())
    measured = (
        f"{told}; a sample costs FlashDP {excess:+.1%} of the parameters beyond what it costs"
        " non-private training"
    )
    grows = bool((np.diff(ratios) > 0).all())
    return Verdict(
        (
            "holds"
            if grows and abs(excess) <= 0.05
            else "partly"
            if grows or abs(excess) <= 0.05
            else "fails"
        ),
        measured,
    )


@claim(
    id="flashdp.fastest",
    claim="No other way of private training is as fast.",
    source="table 1 (Opacus, GhostClip, book-keeping)",
    bound=(
        "higher throughput than every other private method in every cell with at least 128 tokens;"
        " partly: in most"
    ),
    paper=UNKNOWN,
    needs="rows of flashdp/batch_size with sequences of at least 128 tokens",
)
def fastest(batch_size: pd.DataFrame) -> Verdict:
    found = _long(batch_size)
    others = found[~found["method"].isin((labels.NON_PRIVATE, labels.FLASHDP))]
    if others.empty:
        return Verdict("not tested here", "no sequences of 128 tokens or more")
    best = others.loc[others.groupby("batch_size")["throughput_share"].idxmax()].set_index(
        "batch_size"
    )
    flash = found[found["method"] == labels.FLASHDP].set_index("batch_size")["throughput_share"]
    lead = flash / best["throughput_share"]
    measured = ", ".join(
        f"{lead[batch]:.2f}x {best.loc[batch, 'method']} at {batch}" for batch in lead.index
    )
    ahead = (lead > 1).mean()
    return Verdict("holds" if ahead == 1 else "partly" if ahead > 0.5 else "fails", measured)


@claim(
    id="flashdp.opacus",
    claim="FlashDP is much faster than Opacus with per-layer clipping, the tool in use.",
    source="table 1",
    bound="at least 1.3 times its throughput at every batch size",
    paper=UNKNOWN,
    needs="rows of flashdp/batch_size",
)
def opacus(batch_size: pd.DataFrame) -> Verdict:
    found = speeds(batch_size).pivot_table(
        index=["model", "batch_size"], columns="method", values="throughput_share", sort=False
    )
    gains = found[labels.FLASHDP] / found[labels.OPACUS]
    measured = ", ".join(f"{gain:.2f}x at {batch}" for (_, batch), gain in gains.items())
    return Verdict(
        "holds" if gains.min() >= 1.3 else "partly" if gains.max() >= 1.3 else "fails", measured
    )


@claim(
    id="flashdp.sequence",
    claim=(
        "The longer the sequences, the more FlashDP gains on ghost norms, whose cost grows with the"
        " square of the length."
    ),
    source="method (no Gram matrices)",
    bound=(
        "FlashDP's throughput over book-keeping's is higher at the longest sequence than at the"
        " shortest, and above 1 there"
    ),
    paper=UNKNOWN,
    needs="rows of flashdp/sequence_length",
)
def sequence(sequence_length: pd.DataFrame) -> Verdict:
    found = (
        speeds(sequence_length)
        .pivot_table(index="tokens", columns="method", values="throughput_share")
        .sort_index()
    )
    gains = found[labels.FLASHDP] / found[labels.BOOK_KEEPING]
    measured = ", ".join(f"{gain:.2f}x at {tokens}" for tokens, gain in gains.items())
    grows, ahead = gains.iloc[-1] > gains.iloc[0], gains.iloc[-1] > 1
    return Verdict(
        "holds" if grows and ahead else "partly" if grows or ahead else "fails", measured
    )


@claim(
    id="flashdp.redundant",
    claim="Redundant computation is cut.",
    source="abstract",
    bound=(
        f"at least {_REDUNDANT:.0%} fewer operations a step than every earlier implicit method"
        " (GhostClip, book-keeping, Opacus's ghost and fast clipping), and at most 5 % more than"
        " non-private; partly: than some"
    ),
    paper=f"{_REDUNDANT:.0%}",
    needs="rows of flashdp/cost",
)
def redundant(cost: pd.DataFrame) -> Verdict:
    found = costs(cost).set_index("method")
    earlier = found.loc[
        [name for name in labels.FLAT if name in found.index],
        "redundant_share",
    ]
    own = found.loc[labels.FLASHDP, "flops_ratio"]
    measured = f"{own:.3f}x non-private; less than " + ", ".join(
        f"{name} by {share:.1%}" for name, share in earlier.items()
    )
    lean = own <= 1.05
    enough = earlier >= _REDUNDANT
    return Verdict(
        "holds" if lean and enough.all() else "partly" if lean and enough.any() else "fails",
        measured,
    )


@claim(
    id="flashdp.movement",
    claim="Memory movement is cut, by up to a half.",
    source="abstract",
    bound=(
        f"a step moves at least {_MOVEMENT:.0%} fewer bytes than some earlier method; partly: at"
        " least half of that"
    ),
    paper=f"up to {_MOVEMENT:.0%}",
    needs="rows of flashdp/cost",
)
def movement(cost: pd.DataFrame) -> Verdict:
    found = (
        costs(cost)
        .set_index("method")["movement_share"]
        .drop([labels.NON_PRIVATE, labels.FLASHDP, labels.EXPLICIT], errors="ignore")
    )
    measured = ", ".join(f"{share:.1%} less than {name}" for name, share in found.items())
    best = found.max()
    return Verdict(
        "holds" if best >= _MOVEMENT else "partly" if best >= _MOVEMENT / 2 else "fails", measured
    )


@claim(
    id="flashdp.amp",
    claim="It works with mixed precision.",
    source="appendix on automatic mixed precision",
    bound=(
        "clipped gradients in bfloat16 within 5 % of float32 in the median parameter, no sample"
        " above 1.01 times its bound in either backend, and FlashDP's share of the non-private"
        " throughput in bfloat16 at least 75 %"
    ),
    paper=UNKNOWN,
    needs="rows of flashdp/amp",
)
def amp(amp: pd.DataFrame) -> Verdict:
    difference, bound = amp["relative_difference"].median(), amp["largest_contribution_ratio"].max()
    share = mixed_precision(amp)["bfloat16"].value
    measured = (
        f"median difference {difference:.1e}, largest contribution {bound:.5f} of the bound,"
        f" {share:.0%} of non-private in bfloat16"
    )
    if difference > 0.05 or bound > 1.01:
        return Verdict("fails", measured)
    return Verdict("holds" if share >= 0.75 else "partly", measured)


@claim(
    id="flashdp.parallel",
    claim="It scales out with data parallelism and pipelines, without communication of its own.",
    source="appendix on data and pipeline parallelism",
    bound=(
        "two ranks release (with noise: as a whole), and two stages clip to, one process's gradient"
        " within 1e-5, they give"
        " all_reduce the gradients' bytes and no more, and throughput is at least 75 % of"
        " non-private in both layouts"
    ),
    paper=UNKNOWN,
    needs="rows of flashdp/parallel",
)
def parallel(parallel: pd.DataFrame) -> Verdict:
    equal = parallel[parallel["kind"] == "equal"]
    difference = equal["relative_difference"].max()
    sent, gradients = equal["sent_bytes"].max(), equal["gradient_bytes"].max()
    shares = {layout: share.value for layout, share in parallel_shares(parallel).items()}
    told = ", ".join(f"{share:.0%} in {layout}" for layout, share in shares.items())
    measured = (
        f"relative difference {difference:.1e}; {human_bytes(sent)} sent for"
        f" {human_bytes(gradients)} of gradients; {told}"
    )
    if difference > 1e-5 or sent > gradients:
        return Verdict("fails", measured)
    return Verdict("holds" if min(shares.values()) >= 0.75 else "partly", measured)


def _long(batch_size: pd.DataFrame, method: str | None = None) -> pd.DataFrame:
    """Cells with at least 128 tokens, of the first model."""
    found = speeds(batch_size)
    found = found[(found["tokens"] >= 128) & (found["model"] == found["model"].iloc[0])]
    return found if method is None else found[found["method"] == method]
