"""Runs tests that are coroutines, and a pytest of its own for tests of the plugin."""

import asyncio
import inspect
from pathlib import Path

import pytest
from servers import PATIENCE, server

pytest_plugins = ["pytester"]

__all__ = ["server"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine function in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), PATIENCE))
    return True


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Return a folder for tests that may use `server` and `PATIENCE`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    # Lines are not cut.
    monkeypatch.setenv("COLUMNS", "1000")
    pytester.makeconftest("from servers import PATIENCE, server")
    return pytester
