"""Every paper has what the others have, under the same names (`repro check PAPER`)."""

import pytest

from shared import manifest, papers

# what is known to be missing still
LACKING = {
    "infinite_sampling": ["results/reference"],
    **{paper: ["data.py"] for paper in ("sam_if", "meta_if")},
}


@pytest.mark.parametrize("paper", list(manifest.manifests()))
def test_nothing_is_missing(paper):
    known = LACKING.get(paper, [])
    lacking = papers.lacking(paper)
    assert [line for line in lacking if line.split(":")[0] not in known] == []
    assert {line.split(":")[0] for line in lacking} == set(known), "LACKING says too much"
