"""Processes that find each other, agree, and end together, with real ones."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest

from support import fake_flash, several_processes
from tpipe_jax.config.flags import Flags
from tpipe_jax.config.settings import Config
from tpipe_jax.runtime import processes
from tpipe_jax.runtime.processes import _listening_address

MESH = ["--config.mesh.pipe=1", "--config.mesh.data=2"]


def test_all_have_what_the_first_has_and_read_their_rows_once():
    """Four devices on two processes: each reads the rows of its data shard, for two stages."""
    mesh = ["--config.mesh.pipe=2", "--config.mesh.data=2", "--config.mesh.order=data,pipe,model"]
    answers = several_processes.results(several_processes.start_all(2, "exchange", *mesh))
    assert [status for status, _, _ in answers] == [0, 0], answers
    seen = [json.loads(out.splitlines()[-1]) for _, out, _ in answers]
    for one in seen:
        assert one["text"] == "von 0: äöü"
        assert one["nothing"] == ""
        assert one["all"] == ["", "1ü"]
        assert one["hosts"] == [socket.gethostname()] * 2
        assert one["total"] == sum(n * (1 + n) for n in range(12))
    assert [one["asked"] for one in seen] == [[[0, 1]], [[2, 3]]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "status", "first", "last"),
    [
        ("raise", 1, "process 1 on {}: Traceback", "ZeroDivisionError: in the last process"),
        ("late", 1, "process 1 on {}: Traceback", "ZeroDivisionError: in the last process"),
        ("user error", 2, "process 1 on {}: error: this cannot be mended.", "error: this cannot"),
        ("raise in the first", 1, "ZeroDivisionError: in the first process", ""),
    ],
)
def test_one_failing_ends_all_and_the_first_tells(what: str, status: int, first: str, last: str):
    children = several_processes.start_all(2, what, *MESH)
    (status_0, _, err_0), (status_1, _, err_1) = several_processes.results(children)
    assert (status_0, status_1) == (status, status)
    assert first.format(socket.gethostname()) in err_0
    if last:
        assert last in err_1
    else:
        assert "Traceback" not in err_1  # of an error that only follows from the first


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(killed: int):
    """The other waits in a collective; it may notice by its connection or by heartbeats missed."""
    children = several_processes.start_all(2, f"kill {killed}", *MESH)
    children[killed].wait(timeout=400)
    start = time.monotonic()
    answers = several_processes.results(children)
    assert time.monotonic() - start < 30
    status, _, err = answers[1 - killed]
    assert status != 0
    assert err


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_and_all_tell_where():
    children = several_processes.start_all(2, "hang", *MESH)
    (status_0, _, err_0), (status_1, _, err_1) = several_processes.results(children)
    assert (status_0, status_1) == (1, 1)
    host = socket.gethostname()
    assert f"process 1 on {host}: error: step 3 has taken too long" in err_0
    assert "meanwhile process 0 was here:" in err_0
    for own, (call, err) in enumerate((("sync_global_devices(", err_0), ("time.sleep(", err_1))):
        *_, last = err.split("Thread MainThread (most recent call last):")
        assert call in last, own


@pytest.mark.slow
def test_processes_with_other_settings_are_refused():
    each = [["--workdir=a"], ["--workdir=b", "--config.train.seed=3"]]
    answers = several_processes.results(
        several_processes.start_all(2, "exchange", *MESH, each=each)
    )
    assert [status for status, _, _ in answers] == [2, 2]
    sentence = (
        f"process 1 on {socket.gethostname()} was started otherwise than process 0 "
        "(config.train.seed is 3 there and 0 in process 0; workdir is b there and a in process 0)"
    )
    assert all(sentence in err for _, _, err in answers)


@pytest.mark.slow
def test_devices_that_processes_cannot_share_out_are_refused():
    mesh = ["--config.mesh.pipe=3", "--config.mesh.data=1"]
    answers = several_processes.results(several_processes.start_all(2, "exchange", *mesh))
    assert [status for status, _, _ in answers] == [2, 2]
    assert "3 CPU devices cannot be shared out evenly among 2 processes" in answers[0][2]


def test_what_jax_cannot_make_out_is_a_sentence():
    where = ["env", "JAX_COORDINATOR_ADDRESS=127.0.0.1:1234"]
    [(status, _, err)] = several_processes.results(
        [several_processes.start("exchange", *MESH, prefix=where)]
    )
    assert status == 2
    assert err.startswith("error: jax cannot join the processes of this run (Number of processes")
    assert err.count("\n") == 1


def test_processes_with_other_code_are_refused(tmp_path: Path):
    """The package is copied for one of them, and a comment is added."""
    (tmp_path / "configs").symlink_to(several_processes.ROOT / "configs")
    copy = shutil.copytree(several_processes.ROOT / "tpipe_jax", tmp_path / "tpipe_jax")
    with (copy / "planning" / "slicer.py").open("a") as file:
        file.write("# other\n")
    where = [f"--coordinator=127.0.0.1:{several_processes.free_port()}", "--num-processes=2", *MESH]
    children = [
        several_processes.start("exchange", *where, f"--process-id={i}", prefix=prefix)
        for i, prefix in enumerate(
            ([], ["env", f"PYTHONPATH={tmp_path}:{several_processes.ROOT / 'tests'}"])
        )
    ]
    answers = several_processes.results(children)
    assert [status for status, _, _ in answers] == [2, 2]
    assert "was started otherwise than process 0 (tpipe_jax is 0" in answers[0][2]


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("dew-flash-attn-cu12", "0.3.6"),
        ("dew-flash-attn-cu13", "0.3.5"),
        (None, ""),
    ],
)
def test_processes_compare_flash_attention(
    package: str | None, version: str, monkeypatch: pytest.MonkeyPatch
):
    """Where one process has it, `attention.backend=auto` means something else there."""
    fake_flash.install(monkeypatch, package, version)
    facts = processes._facts(Flags(Config(), Path("run")))
    assert facts["FlashAttention"] == (f"{package} {version}" if package else "none")


@pytest.mark.parametrize(
    ("process", "sentence"),
    [
        (0, "for 2 processes, but fewer have come: start the others"),
        (1, "for process 0, but nothing answers at the coordinator's address"),
    ],
)
def test_waiting_for_others_comes_to_an_end(process: int, sentence: str):
    where = [f"--coordinator=127.0.0.1:{several_processes.free_port()}", "--num-processes=2"]
    child = several_processes.start(
        "exchange", *where, f"--process-id={process}", "--join-seconds=1", *MESH
    )
    [(status, out, err)] = several_processes.results([child])
    assert (status, out) == (2, "")
    assert err.startswith("error: waited 1 s ")
    assert sentence in err
    assert err.count("\n") == 1


def test_an_address_that_cannot_be_listened_at_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        where = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2", "--process-id=0"]
        [(status, _, err)] = several_processes.results(
            [several_processes.start("exchange", *where, *MESH)]
        )
    assert status == 2
    assert f"process 0 cannot listen at 127.0.0.1:{port} (Address already in use)" in err


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [
        ("10.0.0.1:5", "10.0.0.1:5"),
        ("[::1]:5", "[::1]:5"),
        ("localhost:5", "localhost:5"),
        ("host-a:5", "[::]:5"),
    ],
)
def test_process_0_listens_at_the_address_given_or_for_a_name_at_all(
    coordinator: str, address: str
):
    assert _listening_address(coordinator) == address


@pytest.mark.slow
def test_names_are_enough_to_find_each_other():
    """The host's own, which often means 127.0.0.1 or 127.0.1.1 to itself."""
    where = [
        f"--coordinator={socket.gethostname()}:{several_processes.free_port()}",
        "--num-processes=2",
    ]
    children = [
        several_processes.start("exchange", *where, f"--process-id={i}", *MESH) for i in range(2)
    ]
    answers = several_processes.results(children)
    assert [status for status, _, _ in answers] == [0, 0], answers
