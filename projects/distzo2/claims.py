"""DistZO2's claims, each bound to a check over measured rows."""

import pandas as pd

from projects.distzo2.tables import FIRST_ORDER, links, peaks, per_rank, speedups
from shared.claims import Verdict, claim
from shared.tables import human_bytes, paper_numbers

_HEADLINE = paper_numbers("distzo2", "headline").set_index("quantity")["value"]
UNKNOWN = "paper value not available"


@claim(
    id="distzo2.equal",
    claim="Distributing the work changes nothing of the result.",
    source="supplementary table Z (accuracy of DistZO2 and MeZO)",
    bound="losses, projected gradients and weights of all ranks equal one process's to the last bit in every mode, over at least 20 steps",
    paper="equal accuracies on two datasets",
    needs="rows of distzo2/equality",
)
def equal(equality: pd.DataFrame) -> Verdict:
    found = equality[~equality["mode"].str.contains("naive")]
    off = found[(found["losses_differing"] > 0) | (found["gradients_differing"] > 0) | ~found["weights_equal"] | ~found["replicas_equal"]]
    steps = int(found["steps"].min())
    if len(off):
        return Verdict("fails", f"{', '.join(off['mode'])} differ")
    return Verdict("holds" if steps >= 20 else "partly", f"no bit differs in {len(found)} modes over {steps} steps")


@claim(
    id="distzo2.large",
    claim="On OPT-175B distributed computing has three times the throughput of ZO2.",
    source="abstract",
    bound="speed-up over one process on the model of 175 billion parameters at least that of the paper",
    paper=f"{_HEADLINE['throughput over ZO2']:g} times",
    needs="several GPUs and OPT-175B",
)
def large(throughput: pd.DataFrame) -> Verdict:
    found = throughput[throughput["model"] == "opt-175b"] if "model" in throughput else throughput.iloc[:0]
    if found.empty:
        return Verdict("not tested here", "no such model here")
    gains = speedups(found)
    best = gains.loc[~gains["mode"].str.startswith("one process"), "speedup_ratio"].max()
    return Verdict("holds" if best >= _HEADLINE["throughput over ZO2"] else "partly" if best > 1 else "fails", f"{best:.2f} times")


@claim(
    id="distzo2.throughput",
    claim="More processes make more tokens a second.",
    source="abstract",
    bound="two ranks of one thread, sharing out the data, at least 1.5 times one process of one thread; partly: more than it",
    paper=UNKNOWN,
    needs="rows of distzo2/throughput",
)
def throughput(throughput: pd.DataFrame) -> Verdict:
    found = speedups(throughput).set_index("mode")["speedup_ratio"]
    if "DDP" not in found:
        return Verdict("not tested here", "no run with the data shared out")
    gain = float(found["DDP"])
    measured = ", ".join(f"{mode} {value:.2f}" for mode, value in found.items() if mode != "one process, 1 thread")
    return Verdict("holds" if gain >= 1.5 else "partly" if gain > 1 else "fails", f"over one process: {measured}")


@claim(
    id="distzo2.memory",
    claim="A rank takes no more device memory than ZO2 alone, however many there are.",
    source="abstract (same memory per GPU)",
    bound="peak of the fullest rank at most 1.05 times ZO2's in every mode and depth, and 1.05 times from the fewest blocks to the most",
    paper=UNKNOWN,
    needs="rows of distzo2/memory",
)
def memory(memory: pd.DataFrame) -> Verdict:
    found = peaks(memory)
    worst = found["zo2_ratio"].max()
    by_depth = found.pivot_table(index="mode", columns="layers", values="device_peak_bytes")
    growth = float((by_depth.iloc[:, -1] / by_depth.iloc[:, 0]).max())
    measured = f"at most {worst:.3f} of ZO2's; {growth:.3f} times from {by_depth.columns[0]} to {by_depth.columns[-1]} blocks"
    return Verdict("holds" if worst <= 1.05 and growth <= 1.05 else "partly" if worst <= 1.2 else "fails", measured)


@claim(
    id="distzo2.communication",
    claim="Ranks exchange scalars, not gradients.",
    source="abstract (scalar gradients)",
    bound="at most 24 bytes sent a micro-batch, rank and step",
    paper=UNKNOWN,
    needs="rows of distzo2/communication",
)
def communication(communication: pd.DataFrame) -> Verdict:
    found = per_rank(communication)
    zo = found[found["mode"] != FIRST_ORDER]
    most = float((zo["scalar_bytes"] / zo["micro_batches"]).max())
    first = found.loc[found["mode"] == FIRST_ORDER, "scalar_bytes"]
    beside = f"; first-order {human_bytes(first.max())}" if len(first) else ""
    return Verdict("holds" if most <= 24 else "fails", f"{most:g} bytes a micro-batch{beside}")


@claim(
    id="distzo2.slices",
    claim="Sliced transfers bring each block over the host's link once, whatever the number of ranks.",
    source="supplementary repository (slicing strategy)",
    bound="uploads of all ranks together equal the blocks, and no rank uploads more than 1.05 N-ths of them; partly: at most 1.5",
    paper=UNKNOWN,
    needs="rows of distzo2/communication",
)
def slices(communication: pd.DataFrame) -> Verdict:
    found = per_rank(communication)
    sliced = found[found["mode"].str.contains("sliced")]
    if sliced.empty:
        return Verdict("not tested here", "no sliced mode")
    together = float((sliced["all_share"] - 1).abs().max())
    most = float((sliced["host_share"] * sliced["ranks"]).max())
    measured = f"all ranks together {1 + together:.4f} of the blocks, the busiest rank {most:.4f} N-ths"
    return Verdict("holds" if together < 1e-9 and most <= 1.05 else "partly" if most <= 1.5 else "fails", measured)


@claim(
    id="distzo2.link",
    claim="Where the link to the host is what limits, slicing makes steps faster.",
    source="supplementary figure 1 (shares of the streams with and without slicing)",
    bound="on the slowest emulated link two sliced ranks at least 1.5 times as fast as two with whole blocks; partly: faster",
    paper=UNKNOWN,
    needs="rows of distzo2/link",
)
def link(link: pd.DataFrame) -> Verdict:
    found = links(link)
    slowest = found[found["link_gigabytes_per_second"] > 0].sort_values("link_gigabytes_per_second").iloc[0]
    gain = float(slowest["gain_ratio"])
    rate = 1000 * slowest["link_gigabytes_per_second"]
    return Verdict("holds" if gain >= 1.5 else "partly" if gain > 1 else "fails", f"{gain:.2f} times at {rate:.0f} MB/s, emulated")
