"""The scripts for clusters, with stand-ins for the programs that start processes there."""

import os
import re
import shlex
import subprocess
import sys
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


def pods() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text())
    return service, job


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
    service, job = pods()
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    command = [*container["command"], *container["args"]]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    words = run(tmp_path / "bin", *command, JOB_COMPLETION_INDEX="7", **env)
    flags = read(words, flags=documented_flags())
    name = job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert flags.processes.coordinator == f"{name}-0.{pod['subdomain']}:29500"
    counts = {job["spec"][field] for field in ("completions", "parallelism")}
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
