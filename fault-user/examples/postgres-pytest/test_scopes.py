"""How long faults last: a `with`, a test, a session."""

import time

import pytest
from pytest_fault import FaultError, UnfiredError

TARGET = "tcp:5432"


def seconds(database):
    """How long a query on a new connection takes."""
    start = time.monotonic()
    assert database.ask("select 1") == "1"
    return time.monotonic() - start


def test_a_test_may_leave_a_fault_on(fault, database):
    fault.apply(f"{TARGET} latency=1s")
    assert seconds(database) >= 1.8


def test_the_next_test_is_unaffected(database):
    assert seconds(database) < 1.8


def test_a_test_may_leave_a_toxic_on(proxy, proxied):
    proxy.add("latency", latency=1000)
    assert seconds(proxied) >= 1.8


def test_the_next_test_is_unaffected_through_the_proxy(proxied):
    assert seconds(proxied) < 1.8


def test_a_session_goes_on_when_a_test_is_reset(fault_session, fault, database):
    slow = fault_session.apply(f"{TARGET} delay=300ms")
    with fault(f"{TARGET} corrupt_data=flip,offset:0"):
        with pytest.raises(Exception):
            database.ask("select 1")
    assert seconds(database) >= 1.8
    fault.close()
    assert seconds(database) >= 1.8
    assert "delay=300ms" in slow.remove()
    assert seconds(database) < 1.8


def test_a_fault_that_never_fires_is_an_error(fault, database):
    with pytest.raises(UnfiredError, match="never fired"):
        with fault("tcp:1 latency=1s"):
            assert database.ask("select 1") == "1"


def test_a_mistake_in_a_rule_is_pointed_at(fault):
    with pytest.raises(FaultError, match="did you mean `latency`"):
        fault.apply(f"{TARGET} latencyy=1s")


def test_an_error_in_the_block_is_the_one_that_is_told(fault, database):
    with pytest.raises(KeyError):
        with fault(f"{TARGET} latency=1s"):
            raise KeyError("of the test")
    assert seconds(database) < 1.8
