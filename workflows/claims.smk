# The verdict on every claim of a paper from its rows, one job per paper.

CLAIMS = {}
for paper in PAPERS:
    CLAIMS[paper] = [result(paper, "claims.json")] if (paths.PROJECTS / paper / "claims.py").is_file() else []
    if CLAIMS[paper]:

        rule:
            name:
                f"{paper}_claims"
            input:
                rows=rows_of(paper, manifest.scale_config(paper, SCALE)),
                sources=sources("projects", paper, "claims.py"),
            output:
                CLAIMS[paper],
            params:
                paper=paper,
            message:
                f"{paper}: claims"
            localrule: True
            shell:
                "{REPRO} claims {params.paper} --scale {SCALE}"


rule claims:
    input:
        sum(CLAIMS.values(), []),
