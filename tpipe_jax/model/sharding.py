"""How a mesh divides the parameters of the model, and which meshes can do so."""

import jax
from jax.sharding import Mesh, PartitionSpec

from tpipe_jax.config.settings import MeshConfig, ModelConfig
from tpipe_jax.devices.mesh import is_spec
from tpipe_jax.errors import UserError
from tpipe_jax.model.block import Params
from tpipe_jax.model.functional import heads, param_shapes
from tpipe_jax.model.registry import block_class
from tpipe_jax.model.transformer import frame_specs

MAX_LAYERS = 10_000


def check_model(config: ModelConfig, mesh: MeshConfig) -> None:
    """Raises `UserError` if the model has too many layers, if 'model' does not divide the operators
    evenly, or if the pipeline cannot run a block of the user's own.
    """
    if config.num_layers > MAX_LAYERS:
        raise UserError(
            f"config.model.num_layers={config.num_layers} is more than the {MAX_LAYERS} that can "
            "be compiled, each as a part of the program: give fewer."
        )
    if config.has_own_block:
        divided = {f"the heads of config.model.block={config.block}, ": heads(config).num_queries}
    else:
        divided = {"config.model.num_heads=": config.num_heads}
        if config.num_experts:
            divided["config.model.num_experts="] = config.num_experts
        else:
            divided["config.model.d_ff="] = config.ff_width
    for name, value in divided.items():
        if value % mesh.model:
            raise UserError(
                f"config.mesh.model={mesh.model} does not divide {name}{value}: pick a divisor."
            )
    num_keys = heads(config).num_keys
    if num_keys % mesh.model and mesh.model % num_keys:
        raise UserError(
            f"config.mesh.model={mesh.model} neither divides the {num_keys} heads of keys nor is a "
            "multiple of them: pick a divisor or a multiple."
        )


def padded_vocab_size(config: ModelConfig, mesh: Mesh) -> int:
    """Rows of the token embedding on the mesh. Each device of 'pipe' and 'model' has equally many.

    The number is aligned for products on GPUs: logits take several times as long for 50257 tokens
    as for 50304 (docs/gpu.md).
    """
    parts = mesh.shape["pipe"] * mesh.shape["model"]
    num_rows = -(-config.vocab_size // parts)
    multiple = 128 if num_rows > 32 * 128 else 8
    return -(-num_rows // multiple) * multiple * parts


def param_specs(config: ModelConfig, num_blocks: int) -> Params:
    """Returns the specs of the parameters on the mesh, as a tree of the parameters' structure.

    Block n of the tree stacks the nth block of every stage, `[P, ...]`, with zeros where a stage
    has no nth block. The layers of one stage are separate arrays, since XLA may copy a layer out of
    a stack for each use. Tables of the vocabulary have `padded_vocab_size` rows. Blocks are divided
    over the stages, and each as `Block.specs` says. A parameter whose spec names no axis is on all
    devices.
    """
    specs = block_class(config).specs_of(config)
    if specs is None:
        specs = jax.tree.map(lambda _: PartitionSpec(), param_shapes(config))
    block = jax.tree.map(lambda spec: PartitionSpec("pipe", *spec), specs, is_leaf=is_spec)
    return frame_specs(config) | {"blocks": [block] * num_blocks}
