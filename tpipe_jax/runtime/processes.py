"""The processes of a run: how they find each other, agree, and stop after the same step.

Built on jax's own distributed runtime. Its coordination service, in process 0, holds a few values
that all processes can read. Before devices are known, processes talk to each other through these
values.
"""

import hashlib
import ipaddress
import itertools
import json
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax._src import distributed  # the coordination service's values have no public name yet
from jax.experimental import multihost_utils

from tpipe_jax.config.flags import Flags, PlanFlags, ProcessFlags
from tpipe_jax.config.settings import FLASH_PACKAGES, differences, to_dict
from tpipe_jax.errors import UserError
from tpipe_jax.runtime.environment import computing
from tpipe_jax.runtime.exits import heeded
from tpipe_jax.runtime.failures import ending_together, print_error
from tpipe_jax.runtime.network import hidden, host_and_port, place_gloo, proxies
from tpipe_jax.runtime.schedulers import check_alone, misleading, told
from tpipe_jax.version import __version__

PACKAGE = Path(__file__).parents[1]
END_SECONDS = 3600  # for process 0 to finish its writing when the others are done
HEARTBEAT_SECONDS = 15  # of silence, after which a process counts as killed or its host as gone


@contextmanager
def joined(flags: Flags | PlanFlags) -> Iterator[int]:
    """Joins the other processes of the run, yields their number, and leaves together with them.

    Call it before anything else of jax. If one process fails inside, all processes end with the
    same exit status, and the first error is printed. A process alone raises its error as usual. If
    the processes do not find each other in time, prints why and ends this one. Raises `UserError`
    if jax cannot join them.
    """
    if not _connect(flags.processes):
        yield 1
        return
    with ending_together():
        _agree(flags)
        yield distributed.global_state.num_processes
        _client().wait_at_barrier("tpipe_jax/end", 1000 * END_SECONDS)
    jax.distributed.shutdown()


def from_first(text: str) -> str:
    """Returns the text of process 0, in all processes."""
    if jax.process_count() == 1:
        return text
    own = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
    own = np.resize(own, length) if len(own) else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8).tobytes().decode()


def stop_notices() -> Callable[[], bool]:
    """Returns a function that tells whether some process has received SIGTERM.

    All processes call the function equally often. It returns True once, at the same call in all
    processes. Until `stop_notices` is called, SIGTERM ends a process as usual.
    """
    jax.config.update("jax_enable_preemption_service", True)
    distributed.global_state.initialize_preemption_sync_manager()
    calls = itertools.count()
    # jax makes a notice due at the number after the last one asked for, never at an earlier one.
    multihost_utils.reached_preemption_sync_point(next(calls))
    return lambda: multihost_utils.reached_preemption_sync_point(next(calls))


def from_all(text: str) -> list[str]:
    """Returns the texts of all processes, in all processes."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(own))))
    padded = np.zeros(max(*lengths, 1), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8)
    return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


def gathered(name: str, text: str, decide: Callable[[list[str]], str]) -> str:
    """Returns what process 0 decides once all processes have given their text. Any thread may call
    it.

    A name is used only once. The other processes wait for a text until its process ends. So a
    process that fails must not raise: it must give a text, which tells of the failure.
    """
    index, client = distributed.global_state.process_id, distributed.global_state.client
    if client is None:
        return decide([text])
    key = f"tpipe_jax/{name}"
    client.key_value_set(f"{key}/{index}", text)
    if index == 0:
        others = range(distributed.global_state.num_processes)
        texts = [client.blocking_key_value_get(f"{key}/{i}", 1000 * END_SECONDS) for i in others]
        for i in others:
            client.key_value_delete(f"{key}/{i}")  # else it stays in process 0's memory
        client.key_value_set(f"{key}/decided", decide(texts))
    return client.blocking_key_value_get(f"{key}/decided", 1000 * END_SECONDS)


def host_names() -> list[str]:
    """The name of each process's host."""
    return from_all(socket.gethostname())


def _connect(flags: ProcessFlags) -> bool:
    """Joins the other processes; returns True when all have come, or False if there are none."""
    given = flags.coordinator, flags.num_processes, flags.process_id
    if given == (None, None, None) and (known := told(os.environ)):
        ids = flags.local_device_ids or known.local_device_ids
        flags = replace(flags, **known._replace(local_device_ids=ids)._asdict())
    listening = _listening_address(flags.coordinator) if flags.coordinator else None
    if listening and flags.process_id == 0:
        _check_listening(listening)  # jax may crash if it cannot listen
    jax.config.update("jax_enable_preemption_service", False)  # until `stop_notices`
    with _giving_up(flags), hidden([*proxies(), *misleading(os.environ)]):
        try:
            jax.distributed.initialize(
                flags.coordinator,
                flags.num_processes,
                flags.process_id,
                flags.local_device_ids,
                cluster_detection_method="deactivate" if flags.coordinator else None,
                # jax aborts the process when this time is up. `_giving_up` ends it earlier.
                initialization_timeout=2 * flags.join_seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                coordinator_bind_address=listening,
            )
        except Exception as error:  # libraries of schedulers raise errors of any type
            if flags.coordinator is None and "coordinator_address" in str(error):
                check_alone(os.environ)
                return False
            raise UserError(
                f"jax cannot join the processes of this run ({error}): tell it about them with "
                "--coordinator, --num-processes and --process-id."
            ) from error
    place_gloo()
    return True


@contextmanager
def _giving_up(flags: ProcessFlags) -> Iterator[None]:
    """Ends this process and prints why, if joining takes longer than `flags.join_seconds`.

    jax waits in C++, where Python handles no signals, and aborts when its own time is up. So a
    timer ends the process. Meanwhile signals end it as the system does by default.
    """

    def give_up() -> None:
        state = distributed.global_state
        address = state.coordinator_address or flags.coordinator or "the scheduler's address"
        count = state.num_processes if flags.num_processes is None else flags.num_processes
        if state.process_id == 0 or _answers(address):
            text = (
                f"waited {flags.join_seconds} s at {address} for {count} processes, but fewer have "
                "come: start the others, announce as many with --num-processes as there are (1 to "
                "run alone), or wait longer with --join-seconds."
            )
        else:
            text = (
                f"waited {flags.join_seconds} s for process 0, but nothing answers at the "
                f"coordinator's address {address}: start process 0 there, see that the address "
                "can be reached from this host, or wait longer with --join-seconds."
            )
        print_error(f"error: {text}")
        os._exit(2)

    timer = threading.Timer(flags.join_seconds, give_up)
    timer.daemon = True
    timer.start()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        timer.cancel()


def _listening_address(coordinator: str) -> str:
    """Returns where process 0 listens: at the coordinator's address if it is a number, else at all
    addresses of its host. A host's name may mean another address on that host than on others.
    """
    host, port = host_and_port(coordinator)
    try:
        ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return f"[::]:{port}"
    return coordinator


def _check_listening(address: str) -> None:
    """Raises `UserError` if no program can listen at the address."""
    host, port = host_and_port(address)
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {address} ({error.strerror}): give --coordinator an "
            "address of its host, and a port that no other program uses."
        ) from error


def _answers(address: str) -> bool:
    try:
        socket.create_connection(host_and_port(address), 3).close()
    except (OSError, ValueError):
        return False
    return True


def _agree(flags: Flags | PlanFlags) -> None:
    """Raises `UserError` if this process has other settings or versions than process 0."""
    ours = json.loads(json.dumps(_facts(flags)))
    key, client = "tpipe_jax/facts", _client()
    if distributed.global_state.process_id == 0:
        client.key_value_set(key, json.dumps(ours))
    theirs = json.loads(client.blocking_key_value_get(key, 1000 * flags.processes.join_seconds))
    found = [
        f"{name} is {own} there and {first} in process 0"
        for name, own, first in differences(ours, theirs, name="")
    ]
    if found:
        raise UserError(
            f"process {distributed.global_state.process_id} on {socket.gethostname()} was started "
            f"otherwise than process 0 ({'; '.join(found)}): start all processes with the same "
            "settings, versions and variables."
        )


def _facts(flags: Flags | PlanFlags) -> dict[str, Any]:
    """Returns what must be the same in all processes."""
    code = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "config": to_dict(flags.config),
        "workdir": str(flags.workdir),
        "num_processes": distributed.global_state.num_processes,
        "tpipe_jax": f"{__version__} ({code.hexdigest()[:12]})",
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "FlashAttention": _flash_attention(),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **computing(os.environ),
    }


def _flash_attention() -> str:
    """The version of FlashAttention; where it is, config.attention.backend=auto takes it."""
    for package in FLASH_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            return f"{package} {metadata.version(package)}"
    return "none"


def _client() -> Any:
    return distributed.global_state.client
