"""The errors of this package. Each is one line."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # The type that pytest declares can't be a base.
    class _Failed(BaseException):
        def __init__(self, msg: str, pytrace: bool) -> None: ...

else:
    _Failed = pytest.fail.Exception


class FaultError(_Failed):
    """The rules could not be applied, or `fault` ended early.

    The test fails with this line, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, pytrace=False)


class UnfiredError(FaultError):
    """A rule never fired, so the test did not test it."""


class UnavailableError(Exception):
    """The program `fault` is missing, or lacks the rights that it needs."""
