"""The folder of a run: what is left of a run that is refused."""

from pathlib import Path

import pytest

from support import runs
from tpipe_jax.errors import UserError
from tpipe_jax.reporting.workdir import left_as_found


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path):
    config = runs.changed(
        runs.small_config(tmp_path), memory={"limit_gib": 1e-6}, plan={"token_slices": "8,8"}
    )
    with pytest.raises(UserError, match=r"limit_gib"):
        runs.run(config, tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def refuse(folder: Path, *names: str) -> None:
    with left_as_found(folder):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
        raise UserError("x")


@pytest.mark.parametrize(("names", "is_kept"), [((), False), (("1",), True)])
def test_what_was_there_is_kept(names: tuple[str, ...], is_kept: bool, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError):
        refuse(tmp_path / "run" / "checkpoints", *names)
    assert (tmp_path / "run").exists()
    assert (tmp_path / "run" / "checkpoints").exists() == is_kept
