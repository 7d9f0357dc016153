"""What may be saved: policies, lists of names, and what is refused."""

import pytest

from tpipe_jax.config.settings import MemoryConfig
from tpipe_jax.errors import UserError
from tpipe_jax.model.remat import CANDIDATES, EVERYTHING, candidates, saved_names


def test_policies_and_names():
    assert saved_names("full") == ()
    assert set(saved_names("dots")) < set(saved_names("none")) == set(EVERYTHING)
    assert saved_names("auto") == saved_names(CANDIDATES[0])
    assert saved_names("hidden, attn,hidden") == ("hidden", "attn")


def test_auto_goes_from_what_is_fast_to_what_is_small():
    sizes = [len(saved_names(remat)) for remat in candidates(MemoryConfig())]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 0
    assert candidates(MemoryConfig(remat="attn,q")) == ["attn,q"]
    assert candidates(MemoryConfig(defer_weight_grads=True)) == ["dots"]


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        (MemoryConfig(remat="some"), "remat=some has some, which no value of a layer is called"),
        (MemoryConfig(remat="attn,"), "remat=attn, has an empty name, which no value"),
        (MemoryConfig(remat="dots,attn"), "remat=dots,attn has dots, which no value"),
        (
            MemoryConfig(remat="full", defer_weight_grads=True),
            "defer_weight_grads needs attn, middle, hidden saved, which config.memory.remat=full",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused(memory: MemoryConfig, sentence: str):
    with pytest.raises(UserError) as error:
        candidates(memory)
    assert sentence in str(error.value)
