# Every figure of a paper from its rows, one job per paper.

FIGURES = {}
FIGURE_ROWS = []
for paper in PAPERS:
    wanted = manifest.ready(paper, SCALE, "figures")
    FIGURES[paper] = [result(paper, "figures", f"{name}.{suffix}") for name in wanted for suffix in ("svg", "png")]
    FIGURE_ROWS += rows_of(paper, sum(wanted.values(), []))
    if wanted:

        rule:
            name:
                f"{paper}_figures"
            input:
                rows=rows_of(paper, sum(wanted.values(), [])),
                sources=sources("projects", paper, "figures.py"),
                numbers=paper_numbers(paper),
            output:
                [report(file, category=paper, subcategory="figures") if file.endswith(".svg") else file for file in FIGURES[paper]],
            params:
                paper=paper,
            message:
                f"{paper}: figures"
            localrule: True
            shell:
                "{REPRO} figure {params.paper} --scale {SCALE}"


rule figures:
    input:
        sum(FIGURES.values(), []),
        FIGURE_ROWS,
