"""Which values of a layer are saved for its backward pass; the others are computed again. No jax.

The input of a layer, its keys and its values are always saved.
"""

from tpipe_jax.config.settings import MemoryConfig
from tpipe_jax.errors import UserError

DOTS = ("q", "attn", "middle", "router", "hidden")
EVERYTHING = (*DOTS, "norm_1", "norm_2", "gelu", "swiglu")
POLICIES = {"none": EVERYTHING, "dots": DOTS, "full": ()}
# From the fastest to the smallest. `none` is no faster than `dots` (docs/design.md).
CANDIDATES = ("dots", "attn", "full")
DEFERRED = ("attn", "middle", "hidden")  # deferred gradients of weights are computed from these


def candidates(config: MemoryConfig) -> list[str]:
    """Returns the values of `config.remat` to choose from, from the fastest to the smallest. Only
    `auto` has more than one.

    Raises `UserError` if `config.remat` is neither a policy nor a list of names, or if it saves too
    little for `config.defer_weight_grads`.
    """
    chosen = list(CANDIDATES) if config.remat == "auto" else [config.remat]
    if config.defer_weight_grads:
        chosen = [remat for remat in chosen if set(DEFERRED) <= set(saved_names(remat))]
    if not chosen:
        raise UserError(
            f"config.memory.defer_weight_grads needs {', '.join(DEFERRED)} saved, which "
            f"config.memory.remat={config.remat} does not: set it to dots or none."
        )
    for remat in chosen:
        saved_names(remat)
    return chosen


def saved_names(remat: str) -> tuple[str, ...]:
    """Returns the names of the values that are saved. `auto` means the first of `CANDIDATES`.

    Raises `UserError` if `remat` is neither a policy nor a list of names.
    """
    if remat == "auto":
        remat = CANDIDATES[0]
    if remat in POLICIES:
        return POLICIES[remat]
    names = tuple(dict.fromkeys(name.strip() for name in remat.split(",")))
    unknown = [name for name in names if name not in EVERYTHING]
    if unknown:
        raise UserError(
            f"config.memory.remat={remat} has {unknown[0] or 'an empty name'}, which no value of a "
            f"layer is called: give auto, {', '.join(POLICIES)}, or names out of "
            f"{','.join(EVERYTHING)}."
        )
    return names
