"""A pytest plugin: network faults for the length of a `with`, a test or a session.

    def test_a_slow_database(fault):
        with fault("tcp:5432", "latency=1s"):
            ...

Add `pytest_plugins = ["pytest_fault"]` to conftest.py. `fault` is found in PATH, or where the environment
variable FAULT says; without root it is started by `sudo -n`.
"""

import pytest

from .daemon import Daemon
from .rules import Faults

__all__ = ["Daemon", "Faults"]


@pytest.fixture
def fault():
    """Faults that end with the test at the latest, whatever the test leaves on."""
    with Faults() as faults:
        yield faults


@pytest.fixture(scope="session")
def fault_session():
    """Faults that end with the session at the latest; for fixtures of wider scope."""
    with Faults() as faults:
        yield faults


@pytest.fixture(scope="session")
def fault_daemon():
    """A `fault daemon` for the session, for proxies whose open connections are hurt and go on."""
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def _daemon_is_reset(request):
    """Takes away, after each test, every toxic that it left on."""
    yield
    if "fault_daemon" in request.fixturenames:
        request.getfixturevalue("fault_daemon").reset()
