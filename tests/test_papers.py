"""Every paper has what the others have, under the same names (`repro check PAPER`)."""

import pytest

from shared import manifest, papers


@pytest.mark.parametrize("paper", list(manifest.manifests()))
def test_nothing_is_missing(paper):
    assert papers.lacking(paper) == []
