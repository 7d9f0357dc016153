"""How the processes of a run reach each other: without proxies, at addresses that others reach."""

import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax._src import distributed, xla_bridge  # gloo's address has no public setting
from jaxlib import _jax


def proxies() -> list[str]:
    """Returns the variables of proxies. gRPC would ask those for the coordinator, and jax warns of
    them.
    """
    return [name for name in os.environ if "_proxy" in name.lower()]


@contextmanager
def hidden(names: Iterable[str]) -> Iterator[None]:
    """Takes variables out of the environment for a while."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def place_gloo() -> None:
    """Gives gloo, which joins CPU devices, the address from which this host reaches the
    coordinator, if the host's own name has none that others reach.

    Call it when the processes have joined, before jax makes its devices.
    """
    coordinator = distributed.global_state.coordinator_address
    assert coordinator is not None
    host, port = host_and_port(coordinator)
    address = gloo_address(host, port)
    if address is None:
        return

    def make_client() -> Any:
        collectives = None
        if jax.config.jax_cpu_collectives_implementation == "gloo":  # pyrefly: ignore
            collectives = _jax.make_gloo_tcp_collectives(
                distributed_client=distributed.global_state.client, hostname=address
            )
        return xla_bridge.make_cpu_client(collectives)

    xla_bridge.register_backend_factory("cpu", make_client, priority=0, fail_quietly=False)


def gloo_address(host: str, port: int) -> str | None:
    """Returns this host's address towards another, or None where gloo can take that of the host's
    name, as it does by itself.
    """
    towards = _address_towards(host, port)
    own = _own_address()
    if towards is None or (own and (_is_loopback(towards) or not _is_loopback(own))):
        return None
    return towards


def host_and_port(address: str) -> tuple[str, int]:
    """Returns the two parts of HOST:PORT, in which the host may be an address in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _address_towards(host: str, port: int) -> str | None:
    with suppress(OSError, UnicodeError):
        for family, kind, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(where)  # finds the route, and sends nothing
                return probe.getsockname()[0]
    return None


def _own_address() -> str | None:
    """Returns the first address of the host's name at which a program can listen."""
    with suppress(OSError, UnicodeError):
        for family, kind, _, _, where in socket.getaddrinfo(
            socket.gethostname(), 0, type=socket.SOCK_STREAM
        ):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(where)
                return probe.getsockname()[0]
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
