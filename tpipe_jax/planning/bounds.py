"""The most that a plan may ask for. Each bound comes from what the work costs. No jax."""

from tpipe_jax.errors import UserError

# A schedule has two tables, [tick, stage], with a tick for each slice and each stage. So many cells
# are made, simulated, written and drawn in half a minute and 2 GiB.
MAX_CELLS = 2**19
# Seconds of slices, [sequences, units, units]. The slicer keeps about twelve such arrays: 1 GiB.
MAX_TIMES = 2**23
# The slicer divides the sequences of a data shard in a time that grows with their square, and each
# batch slice is embedded on its own.
MAX_SEQUENCES = 2**12
# Each shape of slices is a program that is compiled for seconds.
MAX_SHAPES = 256
# XLA describes each device that is not here, and a plan tries all ways to divide them.
MAX_DEVICES = 2**16


def most_slices(num_stages: int) -> int:
    """Returns the most slices that a schedule of so many stages may have, those of each chunk of
    the stages counted; 0 or less if there are too many stages.
    """
    return MAX_CELLS // num_stages - num_stages


MAX_STAGES = max(n for n in range(1, 2**10) if most_slices(n) > 0)


def check_stages(setting: str, num_stages: int) -> None:
    """Raises `UserError` if no schedule can have so many stages."""
    if num_stages > MAX_STAGES:
        raise UserError(
            f"{setting}={num_stages} must be at most {MAX_STAGES} stages, since the tables of a "
            "schedule grow with their square: use fewer stages, and more of config.mesh.data or "
            "config.mesh.model."
        )


def check_slices(name: str, num_stages: int, num_slices: int) -> None:
    """Raises `UserError` if a schedule of so many stages cannot have so many slices; `name` begins
    the sentence.
    """
    if num_slices > most_slices(num_stages):
        raise UserError(
            f"{name} makes {num_slices} slices, and {num_stages} stages can work on at most "
            f"{most_slices(num_stages)}: make fewer batch slices or token slices."
        )


def fits_times(num_rows: int, num_units: int) -> bool:
    """Whether the times of all slices of so many sequences and units may be planned with."""
    return num_rows * num_units**2 <= MAX_TIMES


def check_times(name: str, num_rows: int, num_units: int, remedy: str) -> None:
    """Raises `UserError` if the times of all slices are too many to plan with; `name` begins the
    sentence, and `remedy` ends it.
    """
    if not fits_times(num_rows, num_units):
        raise UserError(
            f"{name} makes {num_units} places to cut each of {num_rows} sequences, whose slices "
            f"have {num_rows * num_units**2} times, and at most {MAX_TIMES} can be planned with: "
            f"{remedy}."
        )


def check_sequences(setting: str, num_rows: int) -> None:
    """Raises `UserError` if batch slices of so many sequences cannot be planned."""
    if num_rows > MAX_SEQUENCES:
        raise UserError(
            f"{setting}={num_rows} must be at most {MAX_SEQUENCES} sequences of a data shard for "
            "their batch slices to be planned: give config.plan.batch_slices, or use more data "
            "shards."
        )


def check_devices(setting: str, num_devices: int) -> None:
    """Raises `UserError` if there are too many devices to plan or compile for."""
    if num_devices > MAX_DEVICES:
        raise UserError(
            f"{setting} makes {num_devices} devices, and at most {MAX_DEVICES} that are not here "
            "can be planned or compiled for: ask for fewer."
        )
