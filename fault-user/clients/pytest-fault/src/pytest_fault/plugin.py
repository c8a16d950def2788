"""The pytest plugin: the marker and the fixture `fault`, and their options."""

import random
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pytest_fault.errors import FaultError, UnavailableError
from pytest_fault.program import find_command
from pytest_fault.rules import Faults, Settings, check_rules

_SEED = pytest.StashKey[int]()
_FAULTS = pytest.StashKey[Faults]()

_MARKER = (
    "fault(*rules, allow_unfired=False, options=()): run the test with these network faults, "
    'e.g. "tcp:5432 latency=200ms", on the traffic of pytest and the processes it starts'
)


@dataclass(frozen=True)
class _Arguments:
    """The keyword arguments of a marker."""

    allow_unfired: bool = False
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, marker: pytest.Mark) -> "_Arguments":
        unknown = marker.kwargs.keys() - {"allow_unfired", "options"}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise FaultError(f"fault: unknown argument {names}: use allow_unfired or options")
        options = marker.kwargs.get("options", ())
        if isinstance(options, str):
            raise FaultError(f"fault: options is a list of words, not {options!r}")
        return cls(bool(marker.kwargs.get("allow_unfired", False)), tuple(options))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("fault", "network faults")
    group.addoption(
        "--fault-report",
        metavar="DIR",
        type=Path,
        help="write a report of each test with faults into a subfolder of DIR",
    )
    group.addoption(
        "--fault-seed",
        metavar="N",
        type=int,
        help="the random seed of all faults; default: drawn and printed",
    )
    group.addoption(
        "--fault-required",
        action="store_true",
        help="fail, instead of skip, tests with faults where fault is missing or has no rights",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker and choose the seed."""
    config.addinivalue_line("markers", _MARKER)
    seed = config.getoption("--fault-seed")
    if seed is None:
        # With pytest-xdist all workers use the controller's.
        workerinput = getattr(config, "workerinput", {})
        seed = workerinput.get("fault_seed", random.getrandbits(32))
    config.stash[_SEED] = seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # noqa: ANN401 (a class of pytest-xdist)
    """Hand the seed to a worker of pytest-xdist."""
    node.workerinput["fault_seed"] = node.config.stash[_SEED]


def pytest_report_header(config: pytest.Config) -> str:
    """Print the seed."""
    seed = config.stash[_SEED]
    return f"fault: seed {seed} (--fault-seed {seed} repeats it)"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test with faults that can't be applied here, before its fixtures are set up."""
    if _marked(item):
        _require_program(item.config)


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, None]:
    """Apply the rules of the markers while the test itself runs."""
    for arguments, rules in _marked(item).items():
        _faults(item).apply(
            *rules, allow_unfired=arguments.allow_unfired, options=arguments.options
        )
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    """Remove the faults of a test that has run; one that never fired fails it."""
    if call.when == "call":
        try:
            _faults(item).close()
        except FaultError:
            # The test's own error is the one to show.
            if call.excinfo is None:
                call.excinfo = pytest.ExceptionInfo.from_current()
        for summary in _faults(item).settings.summaries:
            item.add_report_section("call", "fault", summary)
    yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Remove what a test left that was not run to its end, before its fixtures are torn down."""
    try:
        _faults(item).close()
    except FaultError:
        pass  # The set-up failed, or the run was interrupted: that is the error to show.


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Faults:
    """Network faults on the traffic of pytest and the processes it starts.

    `with fault("tcp:5432 latency=200ms"):` applies rules for a block, `fault.apply(...)` until the
    end of the test. A rule that never fires fails the test.
    """
    _require_program(request.config)
    node: pytest.Item = request.node
    return _faults(node)


def _faults(item: pytest.Item) -> Faults:
    return item.stash.setdefault(_FAULTS, Faults(_settings(item)))


def _settings(item: pytest.Item) -> Settings:
    folder: Path | None = item.config.getoption("--fault-report")
    if folder is not None:
        folder /= _folder_of(item.nodeid)
    return Settings(seed=item.config.stash[_SEED], report=folder)


def _folder_of(nodeid: str) -> Path:
    """Return a folder for a test's report, such as `tests/test_web.py/test_get[1]`."""
    test, bracket, parameters = nodeid.partition("[")
    parts = [part for part in re.split("::|/", test) if part not in ("", ".", "..")]
    parts[-1] += bracket + quote(parameters, safe="[] ,=")[:150]
    return Path(*parts)


def _marked(item: pytest.Item) -> dict[_Arguments, list[str]]:
    """Return the rules of an item's markers by their arguments.

    Those of the class come before those of the function.
    """
    marked: dict[_Arguments, list[str]] = {}
    for marker in reversed(list(item.iter_markers("fault"))):
        arguments = _Arguments.of(marker)
        marked.setdefault(arguments, []).extend(check_rules(marker.args))
    return marked


def _require_program(config: pytest.Config) -> None:
    try:
        find_command()
    except UnavailableError as error:
        if config.getoption("--fault-required"):
            raise FaultError(str(error)) from None
        pytest.skip(str(error))
