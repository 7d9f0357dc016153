"""Names of parts of a program. jax puts them into the compiled text, where they are found again."""

ON_ALL = "on_all_devices"
"""A conditional, or a loop of one turn or none, that all devices take or skip together."""
FORWARD = "forward_lane"
"""The work of a tick in the forward direction."""
BACKWARD = "backward_lane"
"""The work of a tick in the backward direction."""
SLICE = "slice_body"
"""The work of a stage on a slice: a conditional, or a loop of one turn or none, that only stages
with such a slice take."""
CONTEXT = "over_context"
"""A loop of attention over the context of a slice."""
