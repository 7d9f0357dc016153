"""Finds the plan of a step: latency model, slicer, schedules and their simulation, in plain
numbers. No jax.

Programs that plan without a device import these names from here.
"""

from tpipe_jax.planning.latency import LatencyTable, Profile
from tpipe_jax.planning.latency_file import load_table
from tpipe_jax.planning.plan import Plan, PlanRequest, Prediction, read_plan
from tpipe_jax.planning.planner import Planning, find_plan
from tpipe_jax.planning.schedule import Schedule, make_schedule
from tpipe_jax.planning.simulate import Timeline

__all__ = [
    "LatencyTable",
    "Plan",
    "PlanRequest",
    "Planning",
    "Prediction",
    "Profile",
    "Schedule",
    "Timeline",
    "find_plan",
    "load_table",
    "make_schedule",
    "read_plan",
]
