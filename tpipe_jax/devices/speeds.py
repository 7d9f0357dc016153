"""What GPUs and the links between them reach, each figure with its source.

The rates of an H100 and an H200 were measured with the steps of docs/gpu.md. Of a GPU that was not
measured, the same shares of the maker's data sheet are assumed: 72% of the rate of products in 16
bits, and 90% of the memory's bandwidth. The times of a kernel and of a question, and the shares of
attention, are fitted to these steps: all 15 are met within 8%.
"""

from typing import NamedTuple

from tpipe_jax.config.settings import MeshConfig


class Speed(NamedTuple):
    """What a GPU reaches."""

    product_flops: float
    """FLOP/s of a large product in 16 bits."""
    bytes_per_second: float
    """Of its memory."""
    nvlink_bytes_per_second: float
    """To another GPU of its host, in one direction."""
    host_gbits: float
    """Gbit/s of the network of a host that is typical for it, in one direction."""
    is_measured: bool
    """Whether the first two were measured; else they are assumed."""
    pcie_bytes_per_second: float
    """To the memory of its host, in one direction; assumed."""
    forward_attention: float = 0.87
    """The part of `product_flops` that a fused attention kernel reaches."""
    backward_attention: float = 0.65
    kernel_seconds: float = 3.5e-6
    """For each kernel, besides its work."""
    question_seconds: float = 20e-6
    """For each loop or conditional whose course the host has to ask for."""


class Link(NamedTuple):
    """A way between two devices."""

    bytes_per_second: float
    latency_seconds: float


ERROR = 0.15
"""By which fraction a predicted time may be off. The steps that were measured are met within 8%."""

NVLINK_LATENCY = 8e-6  # of an exchange in a host, assumed
# Shares of the data sheet; the last two are assumed.
_PRODUCTS, _MEMORY, _NVLINK, _PCIE = 0.72, 0.90, 0.75, 0.75

# Data sheets of NVIDIA: TFLOP/s in 16 bits, GB/s of the memory, GB/s of NVLink in one direction.
# Networks: a p3.16xlarge of the paper (Li et al. 2021), and the instances p4d and p5 of AWS.
# PCIe: 16 lanes of generation 3, 4 or 5, GB/s in one direction.
_SHEETS = {
    "v100": (125, 898, 150, 25, 16),
    "v100-32": (125, 898, 150, 25, 16),
    "a100": (312, 2039, 300, 400, 32),
    "a100-40": (312, 1555, 300, 400, 32),
    "h100": (989, 3352, 450, 3200, 64),
    "h200": (989, 4800, 450, 3200, 64),
    "b200": (2250, 7672, 900, 3200, 64),
}
_MEASURED = {"h100": (712, 3000), "h200": (700, 4300)}  # TFLOP/s and GB/s, docs/gpu.md


def speed_of(gpu: str) -> Speed:
    """Returns the speed of a GPU by its name in `targets.GPUS`."""
    tflops, gbytes, nvlink, gbits, pcie = _SHEETS[gpu]
    reached = _MEASURED.get(gpu, (_PRODUCTS * tflops, _MEMORY * gbytes))
    return Speed(
        *(reached[0] * 1e12, reached[1] * 1e9, _NVLINK * nvlink * 1e9, gbits),
        *(gpu in _MEASURED, _PCIE * pcie * 1e9),
    )


class Network(NamedTuple):
    """Hosts with GPUs, and what joins them."""

    gpus_per_host: int
    host_bytes_per_second: float
    """Of a host's network, in one direction."""
    latency_seconds: float

    def links(self, speed: Speed, mesh: MeshConfig) -> dict[str, Link]:
        """Returns the slowest link between neighbours along each axis of the mesh. GPUs of a host
        share its network.
        """
        inside = Link(speed.nvlink_bytes_per_second, NVLINK_LATENCY)
        found, stride = {}, 1
        for axis in reversed(mesh.order.split(",")):  # the last axis has the nearest neighbours
            size = getattr(mesh, axis)
            if stride * size <= self.gpus_per_host:
                found[axis] = inside
            else:
                num_senders = min(stride, self.gpus_per_host)
                found[axis] = Link(self.host_bytes_per_second / num_senders, self.latency_seconds)
            stride *= size
        return found
