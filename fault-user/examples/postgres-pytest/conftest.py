"""The database under test, as an application sees it."""

import os

import pytest
from database import Database

pytest_plugins = ["pytest_fault"]

PORT = int(os.environ.get("PGPORT", "5432"))


@pytest.fixture(scope="session")
def database():
    """PostgreSQL where it is."""
    return Database("127.0.0.1", PORT)


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
