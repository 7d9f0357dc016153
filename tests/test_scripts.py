"""The scripts for clusters, with stand-ins for the programs that start processes there."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from support import several_processes
from tpipe_jax.config.command_line import parse
from tpipe_jax.config.config_files import CONFIGS, load_config
from tpipe_jax.config.flags import Flags

LAUNCH = several_processes.ROOT / "launch"
DEVICES = load_config(CONFIGS / "gpt3_175b.py").mesh.num_devices


def install(folder: Path, name: str, script: str) -> None:
    """Puts a program before all others of its name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + script)
    (folder / name).chmod(0o755)


def run(folder: Path, *command: str, **variables: str) -> list[str]:
    """The arguments that Python is started with, and then its XLA_FLAGS."""
    install(folder, "python", 'printf "%s\\n" "$@" "XLA_FLAGS=$XLA_FLAGS"\n')
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
    done = subprocess.run(
        command, cwd=several_processes.ROOT, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def read(words: list[str], *, flags: str) -> Flags:
    program, *args, xla = words
    assert program == "launch/multihost.py"
    assert xla == f"XLA_FLAGS={flags}"
    return parse(args, program="program")


def job_set() -> dict:
    return yaml.safe_load((LAUNCH / "k8s.yaml").read_text())


def documented_flags() -> str:
    text = (several_processes.ROOT / "docs" / "clusters.md").read_text()
    return " ".join(re.findall(r"^\| `(--xla_\S*)` \|", text, re.MULTILINE))


def test_slurm(tmp_path: Path):
    install(tmp_path / "bin", "srun", 'shift 2; exec "$@"\n')
    words = run(tmp_path / "bin", "bash", "launch/slurm.sh", "--config.train.seed=3", "--workdir=w")
    flags = read(words, flags=documented_flags())
    assert flags.config.mesh.num_devices == DEVICES
    assert (flags.config.train.seed, flags.workdir) == (3, Path("w"))
    assert flags.processes.coordinator is None  # jax finds it
    options = dict(re.findall(r"^#SBATCH --(\S+)=(\S+)", (LAUNCH / "slurm.sh").read_text(), re.M))
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == DEVICES
    assert options["ntasks-per-node"] == options["gpus-per-node"]


@pytest.mark.parametrize("status", [0, 1, 138, 143], ids=["done", "failed", "time", "cancelled"])
def test_slurm_queues_again_when_the_time_is_up(status: int, tmp_path: Path):
    install(tmp_path / "bin", "srun", f"exit {status}\n")
    install(tmp_path / "bin", "scontrol", f'echo "$@" > {tmp_path / "asked"}\n')
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    command = ["bash", "launch/slurm.sh"]
    done = subprocess.run(command, cwd=several_processes.ROOT, env=env, check=False)
    assert done.returncode == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == "requeue 77\n" * (status == 138)
    assert status != 138 or status == 128 + signal.SIGUSR1
    assert "#SBATCH --signal=USR1@" in (LAUNCH / "slurm.sh").read_text()


def test_the_image_has_what_the_program_needs():
    """It copies what is there, and installs extras that exist."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "tpipe_jax", "configs", "launch"}
    assert all((several_processes.ROOT / name).exists() for name in copied)
    project = tomllib.loads((several_processes.ROOT / "pyproject.toml").read_text())["project"]
    assert copied >= {project["readme"], *project["license-files"]}
    [extras] = [line.partition("=")[2] for line in lines if line.startswith("ARG EXTRAS=")]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    workdir = next(line.split()[1] for line in lines if line.startswith("WORKDIR "))
    [job] = job_set()["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["workingDir"] == workdir


def test_mpi(tmp_path: Path):
    install(
        tmp_path / "bin",
        "mpirun",
        'test "$2" = hosts.txt || exit 1\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n',
    )
    (tmp_path / "hosts.txt").write_text("host-1 slots=8\nhost-2 slots=8\n")
    script = (LAUNCH / "mpi.sh").read_text().replace('<"$hosts"', f"<{tmp_path / 'hosts.txt'}")
    (tmp_path / "mpi.sh").write_text(script)
    ranks = {"SIZE": "384", "RANK": "13", "LOCAL_RANK": "5"}
    variables = {f"OMPI_COMM_WORLD_{name}": value for name, value in ranks.items()}
    command = ["bash", str(tmp_path / "mpi.sh"), "hosts.txt", "--workdir=a folder"]
    flags = read(run(tmp_path / "bin", *command, **variables), flags=documented_flags())
    assert flags.workdir == Path("a folder")
    processes = flags.processes
    assert processes.coordinator == "host-1:29500"
    assert (processes.num_processes, processes.process_id) == (DEVICES, 13)
    assert processes.local_device_ids == (5,)


def test_kubernetes(tmp_path: Path):
    jobs = job_set()
    [replicated] = jobs["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    command = [*container["command"], *container["args"]]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    words = run(tmp_path / "bin", *command, JOB_COMPLETION_INDEX="7", **env)
    flags = read(words, flags=documented_flags())
    # The names of pods are those of their JobSet, job, number of the job, and own number.
    first = f"{jobs['metadata']['name']}-{replicated['name']}-0-0"
    network = jobs["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert flags.processes.coordinator == f"{first}.{network['subdomain']}:29500"
    assert (replicated["replicas"], job["backoffLimit"]) == (1, 0)
    assert jobs["spec"]["failurePolicy"]["maxRestarts"] > 0
    [port] = container["ports"]
    assert port["containerPort"] == flags.config.metrics.port
    counts = {job[field] for field in ("completions", "parallelism")}
    assert counts == {flags.processes.num_processes}
    assert flags.processes.process_id == 7
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert flags.processes.num_processes * gpus == DEVICES == flags.config.mesh.num_devices
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"/{flags.workdir.parts[1]}" in mounted


@pytest.mark.parametrize("flag", ["documented", "--xla_no_such_flag=1"])
def test_xla_knows_the_flags_that_the_scripts_set(flag: str):
    flags = flag
    if flag == "documented":
        flags = documented_flags()
        assert len(shlex.split(flags)) == 3
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        check=False,
    )
    assert (done.returncode == 0) == (flag == "documented")


@pytest.mark.slow
def test_processes_find_each_other_by_what_slurm_tells_them():
    mesh = ["--config.mesh.pipe=1", "--config.mesh.data=2"]
    port = several_processes.free_port()
    children = []
    for i in range(2):
        variables = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 2}
        variables |= {"PROCID": i, "LOCALID": i}
        settings = [f"SLURM_{name}={value}" for name, value in variables.items()]
        prefix = ["env", *settings, f"JAX_COORDINATOR_PORT={port}"]
        children.append(several_processes.start("exchange", *mesh, prefix=prefix))
    answers = several_processes.results(children)
    assert [status for status, _, _ in answers] == [0, 0], answers
    assert all('"text": "von 0' in out for _, out, _ in answers)
