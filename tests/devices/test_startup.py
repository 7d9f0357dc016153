"""What a process does before it asks jax for devices."""

import os
import platform
import subprocess
import sys
import textwrap

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what other C libraries do is theirs")
def test_freed_memory_is_kept():
    """A buffer that is freed and allocated again does not fault its pages in again."""
    program = """
        import ctypes, resource, sys
        from tpipe_jax.devices.startup import prepare_cpu
        if sys.argv[1] == "keep":
            prepare_cpu(1)
        libc, faults = ctypes.CDLL(None), []
        libc.malloc.restype = ctypes.c_void_p
        for _ in range(3):
            buffer = ctypes.c_void_p(libc.malloc(2**26))
            ctypes.memset(buffer, 1, 2**26)
            libc.free(buffer)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[2] - faults[1])
    """

    def faults(what: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(program), what]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert faults("keep") < 100
    assert faults("give back") > 1000


def flags_after(num_devices: int, before: str) -> list[str]:
    """XLA's flags in a process that prepares for so many devices, and that XLA takes them."""
    program = """
        import os, sys
        from tpipe_jax.devices.startup import prepare_cpu
        prepare_cpu(int(sys.argv[1]))
        import jax
        assert jax.numpy.ones(3).sum() == 3
        print(os.environ["XLA_FLAGS"])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(num_devices)]
    environment = os.environ | {"XLA_FLAGS": before}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_flags_of_the_user_come_last_and_count():
    num_cores = len(os.sched_getaffinity(0))
    flags = flags_after(num_cores, "--xla_cpu_multi_thread_eigen=true")
    assert flags == [
        "--xla_cpu_experimental_ynn_fusion_type=-reduce",
        "--xla_cpu_copy_insertion_use_region_analysis=true",
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_cpu_multi_thread_eigen=true",
    ]
    assert flags_after(num_cores - 1, "") == flags[:2]
