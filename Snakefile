# Every experiment, table, figure, claim and the report. The rules come from projects/*/paper.yaml and scales/<scale>.yaml.
#
#   snakemake --cores all                       everything, at scale cpu
#   snakemake --cores all zo2                   one paper
#   snakemake --cores all figures               (or tables, or claims) of every paper
#   snakemake --cores all --config scale=smoke  a pipeline check, in seconds
#
# profiles/default/config.yaml is read by itself: one failure does not stop the rest, and the same command resumes.

from snakemake.utils import min_version

min_version("9.0")
workdir: workflow.basedir

include: "workflows/common.smk"
include: "workflows/data.smk"
include: "workflows/experiments.smk"
include: "workflows/tables.smk"
include: "workflows/figures.smk"
include: "workflows/claims.smk"
include: "workflows/report.smk"


rule reproduce_all:
    default_target: True
    input:
        rules.report.input,


for paper in PAPERS:

    rule:
        name:
            paper
        input:
            TABLES[paper],
            FIGURES[paper],
            CLAIMS[paper],
            all_rows(paper),
