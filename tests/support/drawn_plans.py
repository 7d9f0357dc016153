"""Plans as hypothesis draws them."""

from hypothesis import strategies as st

from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import (
    SCHEDULES,
)

plans = st.builds(
    lambda num_stages, parts, schedule, num_chunks: Plan(
        num_stages,
        tuple(b for b, _ in parts),
        tuple(t for _, t in parts),
        schedule=schedule,
        num_chunks=num_chunks if schedule == "interleaved" else 1,
    ),
    st.integers(1, 6),
    st.lists(
        st.tuples(
            st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(2, 4),
)
