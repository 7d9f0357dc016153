"""What libraries print to the standard error stream, past Python's own."""

import os
from collections.abc import Callable

import pytest

from tpipe_jax.errors import UserError
from tpipe_jax.runtime.noise import without_noise


def shout() -> None:
    os.write(2, b"could not find drivers\n")


def fail(error: Exception) -> Callable[[], None]:
    def shout_and_fail() -> None:
        shout()
        raise error

    return shout_and_fail


def test_is_kept_back(capfd: pytest.CaptureFixture[str]):
    with without_noise():
        shout()
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RuntimeError("broken"), "could not find drivers\n"), (UserError("set another"), "")],
)
def test_is_shown_if_it_may_tell_why(
    error: Exception, expected: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(type(error)), without_noise():
        fail(error)()
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == f"{expected}heard\n"
