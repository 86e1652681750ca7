# The verdict on every claim of a paper from its rows, one job per paper.

CLAIMS = {}
for paper in PAPERS:
    CLAIMS[paper] = [result(paper, "claims.json")] if (paths.PROJECTS / paper / "claims.py").is_file() else []
    if CLAIMS[paper]:

        rule:
            name:
                f"{paper}_claims"
            input:
                rows=all_rows(paper),
                sources=sources("projects", paper, "claims.py"),
                numbers=paper_numbers(paper),
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
        [file for paper in PAPERS if CLAIMS[paper] for file in all_rows(paper)],
