# Names that every stage uses.

import fcntl
import json
import os
import shlex
import sys

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

try:
    validate(config, "config.schema.yaml")
except WorkflowError as error:  # two lines are enough: the rest is the schema
    raise WorkflowError(" ".join(str(error).splitlines()[:2])) from None

sys.path.insert(0, workflow.basedir)

from shared import data, manifest, paths
from shared.dependencies import files_read, local_imports

SCALE = config["scale"]
RESULTS = paths.results_dir()
if RESULTS.is_relative_to(paths.ROOT):
    RESULTS = RESULTS.relative_to(paths.ROOT)
PAPERS = {name: paper for name, paper in manifest.manifests().items() if manifest.scale_config(name, SCALE)}

# The interpreter that runs Snakemake has the packages; the threads of a job's own libraries are the manifest's, not the job's.
REPRO = f"REPRO_PLAIN_PROGRESS=1 {shlex.quote(sys.executable)} -m shared.cli"
EXEC_REPRO = REPRO.replace(" ", " exec ", 1)


def sources(*parts):
    """The files that a module of this repository imports or reads, itself among them, relative to
    the root."""
    files = local_imports(paths.ROOT.joinpath(*parts))
    return [str(file.relative_to(paths.ROOT)) for file in [*files, *files_read(files)]]


def paper_numbers(paper):
    """The files with the paper's own numbers."""
    files = (paths.PROJECTS / paper / "paper").glob("*.csv")
    return sorted(str(file.relative_to(paths.ROOT)) for file in files)


def result(*parts):
    """A path in the results of this scale."""
    return str(RESULTS.joinpath(SCALE, *parts))


def on_this_machine():
    """Whether jobs share the cores of this machine: a cluster, which has a machine for each, gives no total."""
    try:
        return workflow.cores is not None
    except WorkflowError:
        return False


def alone(wanted):
    """Threads that keep other jobs off this machine; on a cluster just those wanted."""
    return max(workflow.cores, wanted) if on_this_machine() else wanted


if on_this_machine():
    workflow.register_resource("timing", 1)  # two experiments that measure time never run together


def rows_of(paper, experiments):
    """The rows of experiments, and the files that say that they are current (see experiments.smk).

    Targets ask for them beside what is made from them: Snakemake looks for a missing file only where a job that will run wants it.
    """
    return [result(paper, "rows", file) for name in sorted(set(experiments)) for file in (f"{name}.json", f".{name}.current")]


def all_rows(paper):
    return rows_of(paper, manifest.scale_config(paper, SCALE))


# Snakemake's own lock outlives a killed run and then refuses the next one, so the default profile turns it off; this one goes
# with its process. It is taken when jobs begin, so that a dry run works beside a run.
onstart:
    if workflow.is_main_process:
        global LOCK
        LOCK = os.open(paths.ROOT / "Snakefile", os.O_RDONLY)
        try:
            fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkflowError("another snakemake is running in this folder; wait for it or stop it")


onerror:
    print("What failed is named above; all that does not need it is done. The same command resumes.")
