"""Token-level pipeline parallelism (TeraPipe) for training large GPTs in JAX.

The letters at the end of an array's name are its shape, here and in every module; inside
`shard_map` they mean the shape on this device.

B sequences            L tokens of a slice       T tokens of the sequence   C context before the
slice D model width          H heads                   K head width               F feed-forward
width V vocabulary           N layers on a stage       P stages                   S slices M batch
slices
"""

__version__ = "0.1.0"
