"""Token-level pipeline parallelism (TeraPipe) for training large GPTs in JAX.

The letters at the end of an array's name are its shape, here and in every module; inside
`shard_map` they mean the shape on this device.

    B  sequences                M  batch slices
    L  tokens of a slice        S  slices
    T  tokens of the sequence   P  stages
    C  context before a slice   N  layers on a stage
    D  model width              H  heads
    F  feed-forward width       K  head width
    V  vocabulary               t  query, key or value
"""

__version__ = "0.1.0"
