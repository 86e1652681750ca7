"""SAM-IF's claims, each bound to a check over measured rows."""

import pandas as pd

from projects.sam_if.labels import (
    ALL_WRONG_REMOVED,
    CHANCE,
    EDIT_BY_GIF,
    EDIT_BY_HIF,
    EKFAC,
    GRADIENT_DOT,
    IF,
    LOSS,
    NO_EDIT,
    NO_TERM_IN_J,
    NO_TERM_IN_R,
    NONE_REMOVED,
    OTHER_SEED,
    RETRAIN,
    RETRAIN_BATCHES,
    SAM_GIF,
    SAM_GIF_UNROLLED,
    SAM_HIF,
    SAM_HIF_FLOAT32,
    SAM_IF,
    SELF_INFLUENCE,
    TRACIN,
    TRACIN_CAPTUM,
    TRACIN_FORWARD,
    TRAK,
)
from projects.sam_if.tables import times_over, to_retraining
from shared.claims import Verdict, claim
from shared.statistics import mean_interval

UNKNOWN = "paper value not available"
RUN = ["dataset", "seed"]
SEEDS = 5  # the least over which an interval decides


def _wide(frame: pd.DataFrame, column: str, keys: list[str]) -> pd.DataFrame:
    return frame.pivot_table(index=keys, columns="method", values=column, sort=False)


def _by_interval(low: float, high: float, seeds: int, measured: str) -> Verdict:
    """Holds or fails where the interval of a difference that should be positive lies above or below
    0; where it does not say, or there are too few seeds, "partly" with the reason.
    """
    if seeds >= SEEDS and low > 0:
        return Verdict("holds", measured)
    if seeds >= SEEDS and high < 0:
        return Verdict("fails", measured)
    reason = f"undecided at {seeds} seeds" if low <= 0 <= high else f"{seeds} seeds are too few"
    return Verdict("partly", f"{measured}; {reason}")


# ---- the estimators ------------------------------------------------------------------------------


@claim(
    id="sam_if.derivative",
    claim=(
        "SAM-HIF is the derivative of SAM's solution in a sample's weight, with both derivatives of"
        " the perturbation."
    ),
    source="theorem 4.5 (reconstructed)",
    bound=(
        "relative error to the finite difference of the solution found anew below 1e-5 at every"
        " radius, where SAM-IF misses it by more than 1e-3"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/radius",
)
def derivative(radius: pd.DataFrame) -> Verdict:
    moved = radius[radius["rho_scale"] > 0]
    worst = radius.loc[radius["method"] == SAM_HIF, "derivative_error"].max()
    others = (
        moved.loc[moved["method"] == SAM_IF, "derivative_error"].groupby(moved["rho_scale"]).max()
    )
    measured = (
        f"largest error {worst:.1e}; SAM-IF {others.iloc[-1]:.1e} at rho {others.index[-1]:g}"
    )
    if worst >= 1e-5:
        return Verdict("fails", measured)
    return Verdict("holds" if others.iloc[-1] > 1e-3 else "partly", measured)


@claim(
    id="sam_if.no_radius",
    claim="Without a perturbation the estimators are the ordinary influence function.",
    source="definition",
    bound=(
        "at rho 0 scores of IF and SAM-IF differ from SAM-HIF's by less than 1e-9 of the largest"
        " score"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/radius at rho 0",
)
def no_radius(radius: pd.DataFrame) -> Verdict:
    still = radius[(radius["rho_scale"] == 0) & radius["method"].isin([IF, SAM_IF])]
    if still.empty:
        return Verdict("not tested here", "no rows at rho 0")
    worst = still["score_difference"].max()
    return Verdict("holds" if worst < 1e-9 else "fails", f"largest difference {worst:.1e}")


@claim(
    id="sam_if.nearest",
    claim="SAM-HIF predicts the change of the parameters better than SAM-IF and IF do.",
    source="section 4 (reconstructed)",
    bound=(
        "mean error over the samples left out is SAM-HIF's smallest in every run, and below that of"
        " no edit, over at least 5 seeds a data set"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/agreement",
)
def nearest(agreement: pd.DataFrame) -> Verdict:
    errors = _wide(agreement, "parameter_error", RUN)
    names = (SAM_HIF, SAM_IF, IF, NO_EDIT)
    best = errors[SAM_HIF] < errors[[*names[1:]]].min(axis=1)
    means = ", ".join(f"{name} {errors[name].mean():.3f}" for name in names)
    measured = f"{best.sum()} of {len(best)} runs; mean error {means}"
    seeds = errors.groupby("dataset").size().min()
    if not best.all():
        return Verdict("fails", measured)
    return (
        Verdict("holds", measured)
        if seeds >= SEEDS
        else Verdict("partly", f"{measured}; {seeds} seeds are too few")
    )


@claim(
    id="sam_if.order",
    claim="SAM-IF, with its perturbation frozen, lies between SAM-HIF and IF.",
    source="section 4 (reconstructed)",
    bound=(
        "error against the derivative SAM-HIF < SAM-IF < IF in every run, at every radius above 0"
        " (one data set) and on every data set (one radius)"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/radius and of sam_if/agreement",
)
def order(radius: pd.DataFrame, agreement: pd.DataFrame) -> Verdict:
    moved = _wide(radius[radius["rho_scale"] > 0], "derivative_error", ["rho_scale", "seed"])
    runs = _wide(agreement, "derivative_error", RUN)
    between = [
        (errors[SAM_HIF] < errors[SAM_IF]) & (errors[SAM_IF] < errors[IF])
        for errors in (moved, runs)
    ]
    missed = runs[~between[1]].groupby("dataset").size()
    said = "".join(f", not in {count} of {name}" for name, count in missed.items())
    gaps = (moved[IF] / moved[SAM_IF]).groupby("rho_scale").min()
    counts = _wide(agreement, "parameter_error", RUN)
    measured = (
        f"{between[0].sum()} of {len(moved)} runs over the radii (IF's error over SAM-IF's, the"
        " least: " + ", ".join(f"{gap:.2g}x at rho {rho:g}" for rho, gap in gaps.items()) + f");"
        f" {between[1].sum()} of {len(runs)} runs over the data sets{said}; a sample left out,"
        f" whose higher orders all share: {(counts[SAM_IF] < counts[IF]).sum()} of {len(counts)}"
    )
    whole = [bool(one.all()) for one in between]
    return Verdict("holds" if all(whole) else "partly" if any(whole) else "fails", measured)


@claim(
    id="sam_if.radius",
    claim="The error of ordinary influence functions grows with SAM's radius; SAM-HIF's does not.",
    source="motivation (reconstructed)",
    bound=(
        "mean error from the smallest to the largest radius: IF's grows by half at least, SAM-HIF's"
        " by a tenth at most"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/radius",
)
def radius(radius: pd.DataFrame) -> Verdict:
    means = radius.groupby(["method", "rho_scale"])["parameter_error"].mean()
    growth = {name: means[name].iloc[-1] / means[name].iloc[0] for name in (SAM_HIF, SAM_IF, IF)}
    measured = (
        ", ".join(f"{name} {value:.2f}x" for name, value in growth.items())
        + f" at rho {means[IF].index[-1]:g}"
    )
    if growth[IF] < 1.5:
        return Verdict("fails", measured)
    return Verdict("holds" if growth[SAM_HIF] <= 1.1 else "partly", measured)


@claim(
    id="sam_if.both_terms",
    claim="Both derivatives of the perturbation are needed: one alone is worse than none.",
    source="remark on equation 9 in the reviews; ablation of ours",
    bound=(
        "in every run at every radius above 0, and on every data set, the error against the"
        " derivative with either term left out is at least twice that with both left out (SAM-IF)"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/radius and of sam_if/agreement",
)
def both_terms(radius: pd.DataFrame, agreement: pd.DataFrame) -> Verdict:
    moved = _wide(radius[radius["rho_scale"] > 0], "derivative_error", ["rho_scale", "seed"])
    runs = _wide(agreement, "derivative_error", RUN)
    names = [NO_TERM_IN_R, NO_TERM_IN_J]
    times = [errors[names].min(axis=1) / errors[SAM_IF] for errors in (moved, runs)]
    least = times[0].groupby("rho_scale").min()
    left_out = _wide(agreement, "parameter_error", RUN)
    worse = left_out[names].min(axis=1) > left_out[SAM_IF]
    measured = (
        "one term alone over neither, the least: "
        + ", ".join(f"{value:.2g}x at rho {rho:g}" for rho, value in least.items())
        + f"; {times[1].min():.2g}x over the data sets; a sample left out: worse in {worse.sum()}"
        f" of {len(worse)} runs"
    )
    smallest = min(float(one.min()) for one in times)
    return Verdict("holds" if smallest >= 2 else "partly" if smallest > 1 else "fails", measured)


# ---- against retraining --------------------------------------------------------------------------


@claim(
    id="sam_if.correlation",
    claim=(
        "For models trained with SAM, SAM-HIF ranks samples more like retraining does than"
        " ordinary influence functions do."
    ),
    source="abstract; figure 3",
    bound=(
        "difference of Pearson's correlation with leaving one out, SAM-HIF less IF: its 95 %"
        " interval over the runs lies above 0"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/agreement",
)
def correlation(agreement: pd.DataFrame) -> Verdict:
    found = _wide(agreement, "pearson_correlation", RUN)
    mean, low, high = mean_interval(found[SAM_HIF] - found[IF])
    measured = (
        f"{mean:+.4f} ({low:+.4f} to {high:+.4f}); SAM-HIF {found[SAM_HIF].mean():.4f}, IF"
        f" {found[IF].mean():.4f}"
    )
    return _by_interval(low, high, agreement["seed"].nunique(), measured)


@claim(
    id="sam_if.peers",
    claim=(
        "SAM-HIF agrees with retraining better than the attribution methods that know nothing"
        " of curvature or approximate it."
    ),
    source="figure 3",
    bound=(
        "mean Pearson and LDS above those of TRAK, TracIn, EK-FAC and the gradient dot product on"
        " every data set"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/agreement",
)
def peers(agreement: pd.DataFrame) -> Verdict:
    others = [TRAK, TRACIN, EKFAC, GRADIENT_DOT]
    won, said = True, []
    for column, name in (("pearson_correlation", "Pearson"), ("lds_correlation", "LDS")):
        means = _wide(agreement, column, ["dataset"])
        won &= bool((means[SAM_HIF] > means[others].max(axis=1)).all())
        best = means[others].mean().idxmax()
        said.append(
            f"{name}: SAM-HIF {means[SAM_HIF].mean():.3f}, next {best} {means[best].mean():.3f}"
        )
    return Verdict("holds" if won else "fails", "; ".join(said))


@claim(
    id="sam_if.unrolled",
    claim="Where training has not ended, the tangent of the whole run predicts retraining best.",
    source="theorem 4.6 (reconstructed, with the Hessian terms)",
    bound="mean Pearson of SAM-GIF, unrolled, above every other method's on every data set",
    paper=UNKNOWN,
    needs="rows of sam_if/trajectory",
)
def unrolled(trajectory: pd.DataFrame) -> Verdict:
    means = _wide(trajectory, "pearson_correlation", ["dataset"]).drop(columns=OTHER_SEED)
    rest = means.drop(columns=SAM_GIF_UNROLLED)
    best = rest.mean().idxmax()
    measured = f"unrolled {means[SAM_GIF_UNROLLED].mean():.3f}, next {best} {rest[best].mean():.3f}"
    return Verdict(
        "holds" if (means[SAM_GIF_UNROLLED] > rest.max(axis=1)).all() else "fails", measured
    )


@claim(
    id="sam_if.deep",
    claim=(
        "For a deep network trained with SAM, SAM-HIF's scores predict training on other subsets"
        " better than TracIn's and TRAK's."
    ),
    source="figure 3",
    bound="LDS of SAM-HIF above those of IF, TracIn and TRAK, a ResNet-18 on images",
    paper=UNKNOWN,
    needs="rows of sam_if/resnet, on a GPU",
)
def deep(resnet: pd.DataFrame) -> Verdict:
    if resnet["dataset"].iloc[0] == "blobs":
        return Verdict("not tested here", "random numbers, no images")
    scores = resnet[resnet["kind"] == "scores"].groupby("method")["lds_correlation"].mean()
    measured = ", ".join(f"{name} {scores[name]:.3f}" for name in (SAM_HIF, IF, TRACIN, TRAK))
    above = [scores[SAM_HIF] > scores[name] for name in (IF, TRACIN, TRAK)]
    return Verdict("holds" if all(above) else "partly" if any(above[1:]) else "fails", measured)


@claim(
    id="sam_if.gif",
    claim=(
        "The gradients of SAM-GIF, at perturbed points, rank samples better than TracIn's at the"
        " weights themselves."
    ),
    source="abstract; figure 3",
    bound=(
        "difference of Pearson's correlation with retraining, SAM-GIF less TracIn: its 95 %"
        " interval over the runs lies above 0"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/trajectory",
)
def gif(trajectory: pd.DataFrame) -> Verdict:
    found = _wide(trajectory, "pearson_correlation", RUN)
    mean, low, high = mean_interval(found[SAM_GIF] - found[TRACIN])
    measured = (
        f"{mean:+.3f} ({low:+.3f} to {high:+.3f}); SAM-GIF {found[SAM_GIF].mean():.3f}, TracIn"
        f" {found[TRACIN].mean():.3f}"
    )
    return _by_interval(low, high, trajectory["seed"].nunique(), measured)


# ---- applications --------------------------------------------------------------------------------


@claim(
    id="sam_if.editing",
    claim=(
        "A model from which SAM-HIF takes samples out is as accurate as one retrained without them."
    ),
    source="table 1, figure 1",
    bound=(
        "1 % to 5 % removed: mean test accuracy within 1 point of retraining's for every data set,"
        " model and share, and nearer to it than that of the model as it is (no edit): the 95 %"
        " interval of the difference of the absolute gaps, over the seeds, lies above 0"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/editing",
)
def editing(editing: pd.DataFrame) -> Verdict:
    few = to_retraining(editing)
    few = few[(few["removed_share"] > 0) & (few["removed_share"] <= 0.05)]
    found = _wide(few, "accuracy_difference", ["dataset", "model", "removed_share", "seed"]).abs()
    names = (SAM_HIF, SAM_GIF, SAM_IF, IF, NO_EDIT)
    cells = found.groupby(["dataset", "model", "removed_share"])
    worst = cells.mean().max()
    gain = (found[NO_EDIT] - found[SAM_HIF]).groupby("seed").mean()
    mean, low, high = mean_interval(gain)
    same = 100 * few.groupby("method")["same_class_share"].mean()
    measured = (
        "gap in points, mean (worst cell): "
        + ", ".join(f"{name} {found[name].mean():.2f} ({worst[name]:.2f})" for name in names)
        + f"; SAM-HIF nearer than no edit by {mean:+.3f} ({low:+.3f} to {high:+.3f}); same class as"
        f" retrained: SAM-HIF {same[SAM_HIF]:.2f} %, no edit {same[NO_EDIT]:.2f} %"
    )
    if worst[SAM_HIF] > 1:
        return Verdict("fails", measured)
    return _by_interval(low, high, len(gain), measured)


@claim(
    id="sam_if.editing_time",
    claim="Taking samples out by SAM-HIF or SAM-GIF takes a fraction of the time of retraining.",
    source="abstract; table 1",
    bound=(
        "retraining (a run with batches) over the edit: SAM-HIF at least 5x and SAM-GIF above"
        " 1x, at the lower ends of the intervals"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/speed",
)
def editing_time(speed: pd.DataFrame) -> Verdict:
    found = times_over(speed, RETRAIN_BATCHES, [EDIT_BY_HIF, EDIT_BY_GIF])
    hif, gif = found[EDIT_BY_HIF], found[EDIT_BY_GIF]
    measured = (
        f"SAM-HIF {hif.value:.1f}x ({hif.low:.1f} to {hif.high:.1f}), SAM-GIF {gif.value:.2f}x"
        f" ({gif.low:.2f} to {gif.high:.2f})"
    )
    if hif.low <= 1:
        return Verdict("fails", measured)
    return Verdict("holds" if hif.low >= 5 and gif.low > 1 else "partly", measured)


@claim(
    id="sam_if.harmful",
    claim=(
        "Removing the samples that SAM-HIF and SAM-GIF call most harmful makes the model better"
        " than removing as many at random."
    ),
    source="figure 2",
    bound=(
        "mean test accuracy over the shares less chance's: the 95 % interval over the runs lies"
        " above 0 on every data set"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/removal",
)
def harmful(removal: pd.DataFrame) -> Verdict:
    runs = 100 * _curves(removal, RUN)
    above, below, said = [], [], []
    for name in (SAM_HIF, SAM_GIF):
        gains = {
            str(dataset): mean_interval(gain)
            for dataset, gain in (runs[name] - runs[CHANCE]).groupby("dataset")
        }
        above.append(all(gain.low > 0 for gain in gains.values()))
        below.append(any(gain.high < 0 for gain in gains.values()))
        said.append(
            f"{name} "
            + ", ".join(
                f"{dataset} {gain.value:+.2f} points ({gain.low:+.2f} to {gain.high:+.2f})"
                for dataset, gain in gains.items()
            )
        )
    return _over_runs(removal, above, below, "; ".join(said))


@claim(
    id="sam_if.harmful_best",
    claim="Both find harmful samples better than existing attribution methods.",
    source="abstract; figures 2 and 3",
    bound=(
        "mean test accuracy over the shares, SAM-HIF and SAM-GIF less each of IF, TracIn, TRAK,"
        " EK-FAC, self-influence and the loss of the sample itself: the 95 % intervals over the"
        " runs lie above 0"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/removal",
)
def harmful_best(removal: pd.DataFrame) -> Verdict:
    runs = 100 * _curves(removal, RUN)
    others = [IF, TRACIN, TRAK, EKFAC, SELF_INFLUENCE, LOSS]
    said, above, below = [], [], []
    for name in (SAM_HIF, SAM_GIF):
        gains = {one: mean_interval(runs[name] - runs[one]) for one in others}
        above.append(all(gain.low > 0 for gain in gains.values()))
        below.append(any(gain.high < 0 for gain in gains.values()))
        said.append(
            f"{name} {runs[name].mean():.2f} %, over "
            + ", ".join(
                f"{one} {gain.value:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
                for one, gain in gains.items()
            )
        )
    return _over_runs(removal, above, below, "; ".join(said))


def _over_runs(
    removal: pd.DataFrame, above: list[bool], below: list[bool], measured: str
) -> Verdict:
    """From intervals: whether all that were asked of lie above 0, and whether some lie below."""
    seeds = removal["seed"].nunique()
    if seeds < SEEDS:
        return Verdict("partly", f"{measured}; {seeds} seeds are too few")
    if all(above):
        return Verdict("holds", measured)
    return Verdict("fails" if any(below) and not any(above) else "partly", measured)


@claim(
    id="sam_if.mislabelled",
    claim="The estimators find mislabelled samples.",
    source="abstract",
    bound=(
        "mean AUROC of SAM-HIF at least 0.9 on every data set, and not below that of the sample's"
        " own loss"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/removal",
)
def mislabelled(removal: pd.DataFrame) -> Verdict:
    found = _wide(removal[removal["kind"] == "detection"], "detection_auc", ["dataset"])
    names = [SAM_HIF, SAM_GIF, IF, SELF_INFLUENCE, LOSS]
    measured = "; ".join(
        f"{data}: " + ", ".join(f"{name} {row[name]:.3f}" for name in names)
        for data, row in found.iterrows()
    )
    if (found[SAM_HIF] < 0.9).any():
        return Verdict("fails", measured)
    return Verdict("holds" if (found[SAM_HIF] >= found[LOSS]).all() else "partly", measured)


def _curves(removal: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean accuracy by the keys, a column per method."""
    curves = removal[
        (removal["kind"] == "curve") & ~removal["method"].isin([NONE_REMOVED, ALL_WRONG_REMOVED])
    ]
    return _wide(curves, "test_accuracy", keys)


# ---- cost ----------------------------------------------------------------------------------------


@claim(
    id="sam_if.passes",
    claim=(
        "All samples are scored for a query by one solve and three more passes, however many they"
        " are."
    ),
    source="section 4 (reconstructed: adjoint, and forward mode over all samples)",
    bound=(
        "beyond the solve and the gradients at w and wt that it needs: at most 3 passes over the"
        " data, none of per-sample gradients"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/speed",
)
def passes(speed: pd.DataFrame) -> Verdict:
    speed = speed[speed["queries"] == 1]
    whole = speed[(speed["kind"] == "cost") & (speed["method"] == SAM_HIF)].iloc[0]
    solve = speed[speed["kind"] == "solve"].iloc[0]
    beyond = (
        whole["curvature_products"]
        - solve["curvature_products"]
        + whole["forward_mode"]
        + whole["gradients"]
        - solve["gradients"]
    )
    measured = (
        f"{beyond:.0f} passes beyond a solve of {solve['products']:.0f} products of J;"
        f" {whole['per_sample_gradients']:.0f} of per-sample gradients"
    )
    return Verdict(
        "holds" if beyond <= 3 and whole["per_sample_gradients"] == 0 else "fails", measured
    )


@claim(
    id="sam_if.speed",
    claim="Scoring by SAM-HIF is faster than TRAK, TracIn and retraining.",
    source="abstract",
    bound=(
        "time over SAM-HIF's above 1 (lower end of the interval) for TRAK, captum's TracIn, TracIn"
        " in forward mode, and as many trainings as samples"
    ),
    paper=UNKNOWN,
    needs="rows of sam_if/speed",
)
def faster(speed: pd.DataFrame) -> Verdict:
    found = {
        name: times_over(speed, name, [SAM_HIF])[SAM_HIF]
        for name in (
            TRAK,
            TRACIN_CAPTUM,
            TRACIN_FORWARD,
            RETRAIN_BATCHES,
        )
    }
    n = int(speed["n"].iloc[0])
    low = {name: one.low * (n if name.startswith(RETRAIN) else 1) for name, one in found.items()}
    value = {
        name: one.value * (n if name.startswith(RETRAIN) else 1) for name, one in found.items()
    }
    measured = (
        ", ".join(f"{name} {value[name]:,.2f}x" for name in found) + f" (retraining {n} times)"
    )
    slower = [name for name, one in low.items() if one <= 1]
    if RETRAIN_BATCHES in slower or len(slower) > 2:
        return Verdict("fails", measured)
    return Verdict("partly" if slower else "holds", measured)


@claim(
    id="sam_if.dattri",
    claim=(
        "Scoring by SAM-HIF is no slower than dattri's fastest influence function of the same"
        " accuracy, for one query and for many."
    ),
    source="ours",
    bound=(
        "both in float32, for each number of queries: time of the fastest dattri run, whose scores"
        " are within 1e-3 of exact ones or as near as SAM-HIF's, over SAM-HIF's: interval reaches 1"
        " or lies above"
    ),
    paper=None,
    needs="rows of sam_if/speed with the peers installed",
)
def dattri(speed: pd.DataFrame) -> Verdict:
    said, reached = [], []
    for queries, rows in speed[speed["kind"] == "cost"].groupby("queries"):
        errors = rows.set_index("method")["score_error"]
        equal = [
            name
            for name in errors.index
            if "dattri" in name and errors[name] <= max(errors[SAM_HIF_FLOAT32], 1e-3)
        ]
        if not equal:
            continue
        found = {
            name: times_over(speed, name, [SAM_HIF_FLOAT32], int(queries))[SAM_HIF_FLOAT32]
            for name in equal
        }
        name, best = min(found.items(), key=lambda item: item[1].value)
        reached.append(best.high >= 1)
        said.append(
            f"{queries} queries, {name}: {best.value:.2f}x ({best.low:.2f} to {best.high:.2f}),"
            f" error {errors[name]:.1e}, SAM-HIF's {errors[SAM_HIF_FLOAT32]:.1e}"
        )
    if not said:
        return Verdict("not tested here", "no run of dattri is as accurate")
    verdict = "holds" if all(reached) else "partly" if any(reached) else "fails"
    return Verdict(verdict, "; ".join(said))
