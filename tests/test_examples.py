"""The examples, as they are started, and as short as they are promised to be."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tpipe_jax
from runs import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LEARNT = {"train_on_arrays": 1.25, "own_block": 2.5}  # at the end, from 4.6 and 5.5 nats


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path):
    """From another folder."""
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if path.stem in LEARNT:
        losses = re.findall(r"loss ([\d.]+) ", done.stdout)
        assert float(losses[-1]) < LEARNT[path.stem], done.stdout
    else:
        assert re.search(r"token slices .*\d+, \d+.*\npredicted step \d+ ms", done.stdout)


def test_what_the_library_offers():
    for name in tpipe_jax.__all__:
        assert getattr(tpipe_jax, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        tpipe_jax.missing  # noqa: B018
