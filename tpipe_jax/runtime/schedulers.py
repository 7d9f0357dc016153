"""What schedulers and MPI say in the environment about the processes they have started. No jax.

jax reads some of these variables itself. Where they are of a shell, or where another launcher has
started the processes within a job, it would wait for processes that never come.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

from tpipe_jax.errors import UserError

# Number of processes, number of this one, and who sets them. srun may set them too, to its own.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
    ("PMI_SIZE", "PMI_RANK", "MPI's launcher"),
    ("PALS_SIZE", "PALS_RANKID", "PALS"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MPI's launcher"),
    ("WORLD_SIZE", "RANK", "torchrun, or a launcher like it,"),
)
TORCHRUN_ID = "TORCHELASTIC_RUN_ID"  # set by torchrun alone
OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # without it, jax cannot join the processes of Open MPI
SLURM_JOB = "SLURM_JOB_ID"
SLURM = (SLURM_JOB, "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
KUBERNETES, POD_INDEX = "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"


@dataclass(frozen=True)
class Started:
    """A process that was started with others."""

    size_name: str
    size: str
    rank: str
    by: str


class Told(NamedTuple):
    """What a launcher says of this process and the others, as the flags would."""

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None


def told(environ: Mapping[str, str]) -> Told | None:
    """Returns what the variables of torchrun say, which Ray Train and others set too; None if they
    are not all there, or if there is one process.

    torchrun itself listens at MASTER_PORT, so the port after it is taken.
    """
    size, rank, port = (environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"))
    address = environ.get("MASTER_ADDR", "")
    if not (all(text.isdecimal() for text in (size, rank, port)) and address and int(size) > 1):
        return None
    number = int(port) + (TORCHRUN_ID in environ)
    local = environ.get("LOCAL_RANK", "")
    is_shared = local.isdecimal() and environ.get("LOCAL_WORLD_SIZE") != "1"
    host = f"[{address}]" if ":" in address else address
    return Told(f"{host}:{number}", int(size), int(rank), (int(local),) if is_shared else None)


def misleading(environ: Mapping[str, str]) -> list[str]:
    """Returns the variables from which jax would take this process for one of others that do not
    exist, or for another one than it is.
    """
    names, tasks = [], _num_tasks(environ)
    if environ.get("OMPI_COMM_WORLD_SIZE") == "1":
        names.append(OPEN_MPI_4)
    if tasks == "1" or any(started.size != tasks for started in _started(environ)):
        names.append(SLURM_JOB)
    # All pods have the first variable, but only those of an indexed job may be several processes.
    if POD_INDEX not in environ or find_spec("kubernetes") is None:
        names.append(KUBERNETES)
    return names


def check_alone(environ: Mapping[str, str]) -> None:
    """Raises `UserError` if this process was started with others. For where jax has found none."""
    for started in _started(environ):
        raise UserError(
            f"{started.by} has started {started.size} processes ({started.size_name}), but jax "
            "cannot tell how they find each other: start them with --coordinator=HOST:PORT "
            f"--num-processes={started.size} --process-id={started.rank} (in this one), as "
            f"launch/mpi.sh does, or unset {started.size_name} to run alone."
        )
    if environ.get(POD_INDEX, "0") != "0" and KUBERNETES in environ:
        raise UserError(
            f"this is pod {environ[POD_INDEX]} of an indexed job ({POD_INDEX}), but jax finds the "
            "others only with its package kubernetes: start them with --coordinator=HOST:PORT "
            f"--num-processes=N --process-id={environ[POD_INDEX]} (in this one), as "
            f"launch/k8s.yaml does, or unset {POD_INDEX} to run alone."
        )


def _started(environ: Mapping[str, str]) -> Iterator[Started]:
    for size_name, rank_name, by in LAUNCHERS:
        size, rank = environ.get(size_name, ""), environ.get(rank_name, "")
        if size.isdecimal() and rank.isdecimal() and int(size) > 1:
            yield Started(size_name, size, rank, by)


def _num_tasks(environ: Mapping[str, str]) -> str | None:
    """Returns the tasks of this step of a Slurm job, or None if jax would see no step. A shell may
    be a step of one task in a job of many.
    """
    if not all(name in environ for name in SLURM):
        return None
    return environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])
