"""The timing of token slices beside whole sequences, with steps that only count."""

from types import SimpleNamespace
from typing import Any

import pytest

from tpipe_jax.config.settings import Config, TrainConfig
from tpipe_jax.planning.plan import Plan
from tpipe_jax.training import comparison

PLAN = Plan(2, (1,), ((4, 4),))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Any]:
    """The names of the steps that have run, and the sliced step, which takes 1 s on the clock; a
    step with whole sequences takes 3 s.
    """
    made: list[str] = []
    clock = [0.0]

    def step(name: str, seconds: float) -> Any:
        def run(state: int, rows: str) -> tuple[int, dict[str, int]]:
            assert rows == "rows"
            # The first steps of each kind warm up, and take long.
            clock[0] += 100 if made.count(name) < comparison.WARM_UP else seconds
            made.append(name)
            return state + 1, {}

        return run

    def fitting_step(_: Any, plan: Plan, __: Any) -> tuple[None, Any]:
        assert plan == Plan(2, (1,), ((8,),))
        return None, step("whole", 3.0)

    monkeypatch.setattr(comparison, "fitting_step", fitting_step)
    monkeypatch.setattr(comparison.time, "monotonic", lambda: clock[0])
    return made, step("sliced", 1.0)


def compare(sliced: Any, is_stopped: Any = lambda: False) -> comparison.Comparison | None:
    config = Config(train=TrainConfig(compare_steps=1))
    run = SimpleNamespace(config=config, spec=None, optimizer=None)
    return comparison.compare(run, PLAN, sliced, 0, "rows", is_stopped)  # pyrefly: ignore


def test_steps_take_turns_and_the_first_do_not_count(steps: tuple[list[str], Any]):
    calls, sliced = steps
    assert compare(sliced) == comparison.Comparison(sliced_seconds=1.0, whole_seconds=3.0)
    assert calls == ["sliced", "whole"] * (comparison.WARM_UP + 1)


def test_a_stop_ends_it(steps: tuple[list[str], Any]):
    calls, sliced = steps
    assert compare(sliced, lambda: len(calls) >= 4) is None
    assert calls == ["sliced", "whole"] * 2
