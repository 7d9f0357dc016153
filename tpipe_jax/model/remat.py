"""Which values of a layer are saved for its backward pass; the others are computed again. No jax.

The input of a layer, its keys and its values are saved always.
"""

from tpipe_jax.config.settings import MemoryConfig
from tpipe_jax.errors import UserError

DOTS = ("q", "attn", "middle", "hidden")
EVERYTHING = (*DOTS, "norm_1", "norm_2", "gelu")
POLICIES = {"none": EVERYTHING, "dots": DOTS, "full": ()}
# From the fastest to the smallest. `none` is no faster than `dots` (docs/design.md).
CANDIDATES = ("dots", "attn", "full")
DEFERRED = ("attn", "middle", "hidden")  # what deferred weight gradients are made of


def candidates(config: MemoryConfig) -> list[str]:
    """What `config.remat` allows, from the fastest to the smallest, each as it could be set.

    Raises `UserError` if it is no policy and no list of names, or saves too little.
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
    """The names of the values that are saved; those of the first candidate for `auto`.

    Raises `UserError` if it is no policy and no list of names.
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
