# One rule per experiment: its sources, its scale entry and its data in, a rows file out.
#
# update() keeps the old rows until the new ones are renamed over them; Snakemake would delete them first. But it forgets why it
# wanted to run a job that failed, so a second output, which a failed job does not leave behind, says whether the rows are current.

import math

from shared import rows

for paper, known in PAPERS.items():
    for name, entry in manifest.scale_config(paper, SCALE).items():
        needs = manifest.needs(paper, name, SCALE)

        # Rows that were cut, or are those of another experiment, are not current, whatever a stamp says.
        file = rows.rows_path(RESULTS, SCALE, paper, name)
        if workflow.is_main_process and file.exists() and not rows.are_whole(file):
            file.with_name(f".{name}.current").unlink(missing_ok=True)

        rule:
            name:
                f"{paper}_{name}"
            input:
                sources=sources("projects", paper, "experiments", f"{name}.py"),
                data=[str(data.stamp(wanted)) for wanted in needs.data],
                used=rows_of(paper, needs.uses),
            output:
                rows=update(result(paper, "rows", f"{name}.json")),
                current=touch(result(paper, "rows", f".{name}.current")),
            params:
                experiment=f"{paper}/{name}",
                entry=json.dumps(entry, sort_keys=True, default=str),
                threads=needs.threads,
                processes=needs.processes,
            # One that has the GPU, or measures time and is not known to be unmoved by a job on another core, runs alone.
            threads: alone(needs.threads * needs.processes) if needs.gpu or needs.timed and not needs.beside else needs.threads * needs.processes
            resources:
                timing=int(needs.timed),
                mem_mb=math.ceil(1000 * needs.memory_gb),
                runtime=math.ceil(10 + 3 * needs.minutes),
                gpu=needs.processes if needs.gpu else 0,
                slurm_extra="--exclusive" if needs.timed else "",
            message:
                f"{paper}/{name}: {needs.title}"
            # REPRO_DIE_WITH_PARENT: where Snakemake is killed its jobs end too, and never work beside the next run's. `exec`,
            # because the job must be a child of Snakemake itself and not of a shell in between.
            shell:
                "export OMP_NUM_THREADS={params.threads} MKL_NUM_THREADS={params.threads} "
                "OPENBLAS_NUM_THREADS={params.threads} NUMEXPR_NUM_THREADS={params.threads}; "
                "REPRO_DIE_WITH_PARENT=$PPID {EXEC_REPRO} run {params.experiment} --scale {SCALE}"
