# Every table of a paper from its rows, one job per paper.

TABLES = {}
TABLE_ROWS = []
for paper in PAPERS:
    wanted = manifest.ready(paper, SCALE, "tables")
    TABLES[paper] = [result(paper, "tables", f"{name}.{suffix}") for name in wanted for suffix in ("md", "csv", "tex", "html")]
    TABLE_ROWS += rows_of(paper, sum(wanted.values(), []))
    if wanted:

        rule:
            name:
                f"{paper}_tables"
            input:
                rows=rows_of(paper, sum(wanted.values(), [])),
                sources=sources("projects", paper, "tables.py"),
                numbers=paper_numbers(paper),
            output:
                [report(file, category=paper, subcategory="tables") if file.endswith(".html") else file for file in TABLES[paper]],
            params:
                paper=paper,
            message:
                f"{paper}: tables"
            localrule: True
            shell:
                "{REPRO} table {params.paper} --scale {SCALE}"


rule tables:
    input:
        sum(TABLES.values(), []),
        TABLE_ROWS,
