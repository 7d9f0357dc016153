"""Floating-point operations of a training step, and how many a device can do."""

from typing import Any

from tpipe_jax.config import Config
from tpipe_jax.layer import forward_flops

# Dense products in float16 or bfloat16, TFLOP/s, by what jax calls the device, from the makers'
# data sheets; the first that fits counts.
_PEAK_TFLOPS = {
    "V100": 125,
    "A100": 312,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


def step_flops(config: Config) -> float:
    """Of a training step: layers and head forward, and twice that backward. What is computed again
    does not count, nor what the causal mask hides.
    """
    model = config.model
    layers = model.num_layers * forward_flops(model, model.seq_len, 0)
    head = 2 * model.seq_len * model.d_model * model.vocab_size
    return 3.0 * config.train.batch_size * (layers + head)


def peak_flops(config: Config, device: Any) -> float | None:
    """What a device can do in the config's format, FLOP/s, as set or as its maker says; None where
    that is not known.
    """
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if config.precision.compute == "float32":
        return None
    known = (peak for name, peak in _PEAK_TFLOPS.items() if name in device.device_kind)
    peak = next(known, None)
    return None if peak is None else peak * 1e12
