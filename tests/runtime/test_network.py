"""Processes that meet although proxies are set, or the host's own name says nothing."""

import os
import socket
import subprocess

import pytest

from support import meeting, several_processes
from tpipe_jax.runtime import network
from tpipe_jax.runtime.network import gloo_address, hidden, proxies

MESH = ["--config.mesh.pipe=2", "--join-seconds=60"]
TOGETHER = [(0, "2 2\n", "")] * 2
NOBODY = "http://127.0.0.1:9"


def meet(*prefix: str) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of two processes, on the host of the prefix."""
    where = [f"--coordinator=127.0.0.1:{several_processes.free_port()}", "--num-processes=2"]
    children = [
        several_processes.start(
            *where, f"--process-id={i}", *MESH, program=meeting.__file__, prefix=prefix
        )
        for i in range(2)
    ]
    return several_processes.results(children)


def test_processes_meet_without_the_proxies():
    names = ["grpc_proxy", "http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"]
    answers = meet("env", "-u", "no_proxy", *(f"{name}={NOBODY}" for name in names))
    assert answers == TOGETHER


def test_processes_meet_where_the_name_of_the_host_does_not_resolve():
    on_host = ["unshare", "--uts", "sh", "-c", 'hostname nosuch.invalid && exec "$0" "$@"']
    if subprocess.run([*on_host, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no other name can be given to this host")
    assert meet(*on_host) == TOGETHER


def test_proxies_are_hidden_only_for_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", NOBODY)
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.delenv("absent", raising=False)
    assert {"HTTPS_PROXY", "no_proxy"} <= set(proxies())
    with hidden([*proxies(), "absent"]):
        assert not proxies()
    assert (os.environ["HTTPS_PROXY"], os.environ["no_proxy"]) == (NOBODY, "localhost")
    assert "absent" not in os.environ


@pytest.mark.parametrize(
    ("own", "towards", "expected"),
    [
        ("10.0.0.1", "10.0.0.1", None),
        ("10.0.0.1", "10.9.9.1", None),  # another network, which may be the faster one
        ("10.0.0.1", "127.0.0.1", None),
        ("127.0.1.1", "127.0.0.1", None),  # all processes are on this host
        ("127.0.1.1", "10.0.0.1", "10.0.0.1"),
        (None, "10.0.0.1", "10.0.0.1"),
        (None, "127.0.0.1", "127.0.0.1"),
        (None, "::1", "::1"),
        (None, None, None),
    ],
)
def test_gloo_takes_the_address_of_the_name_if_others_reach_it(
    own: str | None, towards: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(network, "_own_address", lambda: own)
    monkeypatch.setattr(network, "_address_towards", lambda host, port: towards)
    assert gloo_address("host-a", 5) == expected


def test_the_address_towards_a_host_and_that_of_a_name(monkeypatch: pytest.MonkeyPatch):
    assert network._address_towards("127.0.0.1", 9) == "127.0.0.1"
    assert network._address_towards("nosuch.invalid", 9) is None
    # A name that means a host of somebody else: no program can listen there.
    foreign = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 0))]
    own = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: foreign)
    assert network._own_address() is None
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [*foreign, own])
    assert network._own_address() == "127.0.0.1"
