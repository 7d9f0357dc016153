"""What a GPU does in one step: its kernels by kind, and the time in which it has none."""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData

# The first kind that has one of these words in the name of a kernel. XLA names its own kernels
# after what they compute.
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "cudnn"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "dot"),
    "exchanges": ("nccl",),
    "sums over contexts": ("scatter",),
    "writes": ("dynamic_update_slice",),
    "sums": ("reduce",),
    "reads": ("dynamic_slice", "slice_fusion"),
    "copies": ("memcpy", "memset"),
}
OTHERS, IDLE = "others", "idle"


def kernel_times(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Number and seconds of the kernels of each kind, and the time in which no kernel runs, of one
    call. Tracing makes a call somewhat slower, most of all its idle time.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [path] = Path(folder).rglob("*.xplane.pb")
        events = sorted(_events(path))
    return by_kind(events)


def by_kind(events: list[tuple[float, float, str]]) -> dict[str, tuple[int, float]]:
    """Number and seconds of events `(start, duration, name)` by kind; in nanoseconds, sorted."""
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    end, idle, num_gaps = events[0][0] if events else 0.0, 0.0, 0
    for start, duration, name in events:
        kind = kind_of(name)
        number, seconds = found[kind]
        found[kind] = number + 1, seconds + duration / 1e9
        if start > end:
            idle, num_gaps = idle + (start - end) / 1e9, num_gaps + 1
        end = max(end, start + duration)
    return dict(found) | {IDLE: (num_gaps, idle)}


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(w in lower for w in words)), OTHERS)


def _events(path: Path) -> list[tuple[float, float, str]]:
    return [
        (event.start_ns, event.duration_ns, event.name)
        for plane in ProfileData.from_file(str(path)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]
