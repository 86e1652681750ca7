# The page, from every table, figure and verdict.

PAGE = result("report.html")


rule page:
    input:
        tables=sum(TABLES.values(), []),
        figures=sum(FIGURES.values(), []),
        claims=sum(CLAIMS.values(), []),
        rows=[file for paper in PAPERS for file in all_rows(paper)],
        manifests=[f"projects/{paper}/paper.yaml" for paper in PAPERS],
        sources=sources("shared", "report.py"),
    output:
        report(PAGE),
    message:
        "report"
    localrule: True
    shell:
        "{REPRO} report --scale {SCALE}"


rule report:
    input:
        PAGE,
        rules.page.input.rows,
