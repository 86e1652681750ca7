# What the experiments of this scale read, fetched into the cache: the only rule that touches the network.

for name in manifest.data_needed(None, SCALE):

    rule:
        name:
            f"fetch_{name.replace('-', '_')}"
        output:
            str(data.stamp(name)),
        params:
            entry=name,
        message:
            f"fetch {name}"
        localrule: True
        shell:
            "{REPRO} data fetch {params.entry}"
