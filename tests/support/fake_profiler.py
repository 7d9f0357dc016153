"""A profiler that takes its times from a formula."""

import dataclasses
import signal
from typing import Any

from support.latencies import profile
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.latency import Deferral, Profile, Sample
from tpipe_jax.profiling.cache_key import profile_key


class FakeProfiler:
    """Stages take as long as their layers, sequences and share of operators say; a model that is
    divided has transfers besides.
    """

    seconds_per_token, calls, stopped_call = 1e-3, 0, 0

    def __init__(self, spec: StageSpec) -> None:
        self._spec, self._config = spec, spec.config

    def profile(self, on_progress: Any, with_deferral: bool) -> Profile:
        type(self).calls += 1
        if self.calls == self.stopped_call:
            signal.raise_signal(signal.SIGINT)
        on_progress(1, 2)
        config, mesh = self._config, self._config.mesh
        batch_size, seq_len = config.train.batch_size // mesh.data, config.model.seq_len
        layers = -(-config.model.num_layers // mesh.pipe)
        each = self.seconds_per_token * layers / mesh.model + 3e-4 * (mesh.model - 1)
        samples = tuple(
            Sample(b, i, j, each * b * i, 2 * each * b * i, False)
            for b in sorted({1, batch_size})
            for i in (2, 8, seq_len)
            for j in (0, 2, 4, 8)
            if i + j <= seq_len
        )
        return profile(
            batch_size=batch_size,
            seq_len=seq_len,
            samples=samples,
            transfer=(1e-5, 0.0),
            outside_seconds=0.01,
            key_block=1,
            key=profile_key(self._spec),
            deferral=Deferral((1.0, 0.0), (0.0, 0.0)) if with_deferral else None,
        )

    def refine(self, before: Profile, wanted: list[tuple[int, int]], on_progress: Any) -> Profile:
        each = before.samples[0].forward_seconds / before.samples[0].num_tokens
        more = tuple(Sample(b, i, 0, each * b * i, 2 * each * b * i, False) for b, i in wanted)
        return dataclasses.replace(before, samples=before.samples + more)
