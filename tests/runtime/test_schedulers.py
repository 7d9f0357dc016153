"""What the environment says about other processes, of schedulers that are not here."""

import pytest

from support import meeting, several_processes
from support.marks import slow
from tpipe_jax.errors import UserError
from tpipe_jax.runtime import schedulers
from tpipe_jax.runtime.schedulers import (
    KUBERNETES,
    OPEN_MPI_4,
    SLURM_JOB,
    TORCHRUN_ID,
    Told,
    check_alone,
    misleading,
    told,
)

STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "nosuch",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
MANY = STEP | {"SLURM_NTASKS": "8"}
PMI = {"PMI_SIZE": "4", "PMI_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1"}
MASTER = {"MASTER_ADDR": "host", "MASTER_PORT": "29400"}


def answer(environ: dict[str, str]) -> tuple[int, str, str]:
    """Exit status, output and errors of a process that may join others."""
    child = several_processes.start(
        "--join-seconds=30",
        "--config.mesh.pipe=2",
        program=meeting.__file__,
        prefix=["env", *(f"{name}={value}" for name, value in environ.items())],
    )
    [answered] = several_processes.results([child])
    return answered


@pytest.mark.parametrize(
    "environ",
    [
        STEP | {KUBERNETES: "10.0.0.1"},
        slow(MANY | {"SLURM_STEP_NUM_TASKS": "1"}),  # a shell in a job
        slow({OPEN_MPI_4: "1.0;tcp://192.0.2.1:3", "OMPI_COMM_WORLD_SIZE": "1"}),
    ],
)
def test_one_process_runs_alone(environ: dict[str, str]):
    assert answer(environ) == (0, "1 2\n", "")


@pytest.mark.parametrize("environ", [STEP | TORCHRUN, slow(PMI), slow(OPEN_MPI)])
def test_a_process_among_others_that_jax_cannot_find_is_refused(environ: dict[str, str]):
    status, out, err = answer(environ)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--process-id=1" in err


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Told("host:29400", 2, 1, None)),
        ({TORCHRUN_ID: "7"}, Told("host:29401", 2, 1, None)),  # whose own port it is
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, Told("host:29400", 2, 1, (3,))),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Told("host:29400", 2, 1, None)),
        ({"MASTER_ADDR": "fd00::7"}, Told("[fd00::7]:29400", 2, 1, None)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"MASTER_ADDR": ""}, None),
        ({"MASTER_PORT": "x"}, None),
        ({"RANK": ""}, None),
    ],
)
def test_variables_of_torchrun(environ: dict[str, str], expected: Told | None):
    assert told(TORCHRUN | MASTER | environ) == expected


@pytest.mark.slow
def test_processes_find_each_other_by_variables_of_torchrun():
    port, children = several_processes.free_port(), []
    for rank in range(2):
        about = {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        prefix = ["env", *(f"{name}={value}" for name, value in about.items())]
        children.append(
            several_processes.start("--config.mesh.pipe=2", program=meeting.__file__, prefix=prefix)
        )
    answers = several_processes.results(children)
    assert [(status, out) for status, out, _ in answers] == [(0, "2 2\n")] * 2, answers


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, []),
        (STEP, [SLURM_JOB]),
        (MANY, []),
        (MANY | {"SLURM_STEP_NUM_TASKS": "8"}, []),
        (MANY | {"SLURM_STEP_NUM_TASKS": "1"}, [SLURM_JOB]),
        (MANY | {"PMI_SIZE": "8", "PMI_RANK": "3"}, []),  # set by srun too
        (MANY | PMI, [SLURM_JOB]),  # started by mpiexec within a job
        (MANY | {"WORLD_SIZE": "64"}, []),  # without a rank it is of no launcher
        (OPEN_MPI | {OPEN_MPI_4: "x"}, []),
        (OPEN_MPI | {OPEN_MPI_4: "x", "OMPI_COMM_WORLD_SIZE": "1"}, [OPEN_MPI_4]),
    ],
)
def test_what_would_mislead_jax(environ: dict[str, str], names: list[str]):
    assert [name for name in misleading(environ) if name in environ] == names


@pytest.mark.parametrize("has_package", [False, True])
@pytest.mark.parametrize("pod", [{}, {"JOB_COMPLETION_INDEX": "0"}])
def test_pods_of_an_indexed_job_find_each_other_with_a_package(
    pod: dict[str, str], has_package: bool, monkeypatch: pytest.MonkeyPatch
):
    found = object() if has_package else None
    monkeypatch.setattr(schedulers, "find_spec", lambda name: found)
    is_misleading = KUBERNETES in misleading({KUBERNETES: "10.0.0.1", **pod})
    assert is_misleading == (not (pod and has_package))


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        (OPEN_MPI, "--num-processes=4 --process-id=1"),
        (PMI, "--num-processes=4 --process-id=1"),
        ({"PALS_SIZE": "3", "PALS_RANKID": "2"}, "--num-processes=3 --process-id=2"),
        (TORCHRUN, "--num-processes=2 --process-id=1"),
        ({KUBERNETES: "x", "JOB_COMPLETION_INDEX": "2"}, "--num-processes=N --process-id=2"),
    ],
)
def test_the_sentence_has_the_flags_and_how_to_run_alone(environ: dict[str, str], flags: str):
    with pytest.raises(UserError) as error:
        check_alone(environ)
    assert f"--coordinator=HOST:PORT {flags} (in this one)" in str(error.value)
    assert str(error.value).endswith(" to run alone.")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "", "RANK": ""},
        {"JOB_COMPLETION_INDEX": "3"},  # outside of Kubernetes
        {KUBERNETES: "x", "JOB_COMPLETION_INDEX": "0"},
        STEP,
    ],
)
def test_what_says_nothing_of_others(environ: dict[str, str]):
    check_alone(environ)
