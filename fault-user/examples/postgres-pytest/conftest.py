"""The database under test, as an application sees it."""

import os

import pytest
from daemon import Daemon
from database import Database
from pytest_fault import Faults

PORT = int(os.environ.get("PGPORT", "5432"))


@pytest.fixture(scope="session")
def database():
    """PostgreSQL where it is."""
    return Database("127.0.0.1", PORT)


@pytest.fixture(scope="session")
def fault_session():
    """Faults for the whole session, whatever single tests remove."""
    faults = Faults()
    yield faults
    faults.close()


@pytest.fixture(scope="session")
def fault_daemon():
    """A `fault daemon` for proxies."""
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def _daemon_is_reset(request):
    """Remove, after each test, every toxic that it left."""
    yield
    if "fault_daemon" in request.fixturenames:
        request.getfixturevalue("fault_daemon").reset()


@pytest.fixture(scope="session")
def proxy(fault_daemon):
    """A proxy to it, for connections that were open before the fault."""
    return fault_daemon.proxy("postgres", f"127.0.0.1:{PORT}")


@pytest.fixture
def proxied(proxy):
    """PostgreSQL through the proxy."""
    return Database(proxy.host, proxy.port)


@pytest.fixture
def old(proxied):
    """A connection that was open before the fault."""
    connection = proxied.connect()
    assert connection.ask("select 6 * 7") == "42"
    yield connection
    connection.close()
