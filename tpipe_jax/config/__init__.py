"""All settings of a run, and the command line that sets them.

Config files and users' own programs import these names from here.
"""

from tpipe_jax.config.settings import (
    BUILT_IN,
    BYTES,
    IGNORE,
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    MemoryConfig,
    MeshConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    PrecisionConfig,
    ScheduleName,
    TrainConfig,
    from_dict,
    resolved,
    to_dict,
)
from tpipe_jax.errors import UserError

__all__ = [
    "BUILT_IN",
    "BYTES",
    "IGNORE",
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "MemoryConfig",
    "MeshConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "PlanConfig",
    "PrecisionConfig",
    "ScheduleName",
    "TrainConfig",
    "UserError",
    "from_dict",
    "resolved",
    "to_dict",
]
