"""The ten conditions of a network, each on new and on old connections, in each direction; and after each the service
must be as it was: on a new connection, and on the old one where that could survive.

The faults act on connections to PostgreSQL itself. Connections that were open before are reached through a proxy of the daemon."""

import time

import psycopg2
import pytest
from database import HASTE_S

DIRECTIONS = ["to-server", "to-client"]
STREAM = {"to-server": "upstream", "to-client": "downstream"}
BOTH = pytest.mark.parametrize("direction", DIRECTIONS)

TARGET = "tcp:5432"
LONG = "x" * 60_000
"""More than a second's worth of a narrow line."""


def is_well(database):
    """The service works on a new connection, and without a fault's wait (the machine may be busy)."""
    start = time.monotonic()
    assert database.ask("select 6 * 7") == "42"
    assert time.monotonic() - start < 3.0


def hangs(ask):
    """Whether it gives no answer."""
    with pytest.raises(TimeoutError):
        ask("select 1", HASTE_S)


def breaks(ask):
    """Whether the connection ends under it."""
    with pytest.raises(psycopg2.Error):
        ask("select 1")


def takes(ask, query, least_s):
    """The answer, which must not come before so many seconds."""
    start = time.monotonic()
    answer = ask(query)
    assert time.monotonic() - start >= least_s
    return answer


def long_query(direction):
    """A query that is long in one direction, and its answer."""
    if direction == "to-client":
        return f"select repeat('x', {len(LONG)})", LONG
    return f"select length('{LONG}')", str(len(LONG))


# 1. The server does not accept.


def test_the_server_does_not_accept(fault, database):
    with fault(f"{TARGET} no_accept"):
        hangs(database.ask)
    is_well(database)


def test_the_server_refuses(fault, database):
    with fault(f"{TARGET} down"):
        breaks(database.ask)
    is_well(database)


def test_the_server_does_not_accept_but_serves_what_is_open(proxy, proxied, old):
    with proxy.toxic("no_accept"):
        hangs(proxied.ask)
        assert old.ask("select 1") == "1"
    is_well(proxied)
    assert old.ask("select 2") == "2"


# 2. Nobody reads: the client (to-client) or the server (to-server).


@BOTH
def test_nobody_reads(fault, database, direction):
    with fault(f"{TARGET} stall dir={direction}"):
        hangs(database.ask)
    is_well(database)


@BOTH
def test_nobody_reads_an_old_connection(proxy, proxied, old, direction):
    with proxy.toxic("stall", STREAM[direction]):
        hangs(old.ask)
    assert old.answer() == "1", "nothing is lost, it resumes"
    is_well(proxied)


# 3. All is read and nothing answered.


@BOTH
def test_all_is_read_and_nothing_answered(fault, database, direction):
    with fault(f"{TARGET} discard dir={direction}"):
        hangs(database.ask)
    is_well(database)


@BOTH
def test_all_is_read_and_nothing_answered_on_an_old_connection(proxy, proxied, old, direction):
    with proxy.toxic("discard", STREAM[direction]):
        hangs(old.ask)
    # What was thrown away does not come back: this connection waits for ever. A new one does not.
    is_well(proxied)


# 4. Connections are closed.


def test_connections_are_closed(fault, database):
    with fault(f"{TARGET} reset_peer"):
        breaks(database.ask)
    is_well(database)


@pytest.mark.parametrize("mode", ["fin", "rst"])
def test_an_old_connection_is_closed(proxy, proxied, old, mode):
    with proxy.toxic("close", mode=mode):
        breaks(old.ask)
    is_well(proxied)


# 5. Data closes connections.


@pytest.mark.parametrize("mode", ["fin", "rst"])
def test_data_closes_connections(fault, database, mode):
    with fault(f"{TARGET} close_on_data={mode}"):
        breaks(database.ask)
    is_well(database)


@BOTH
def test_data_closes_an_old_connection(proxy, proxied, old, direction):
    with proxy.toxic("close_on_data", STREAM[direction]):
        assert not old.ends(0), "not before there is data"
        breaks(old.ask)
    is_well(proxied)


# 6. Data is corrupted.


@BOTH
def test_data_is_corrupted(fault, database, direction):
    # A server's first byte and a client's length make no sense: the handshake fails.
    with fault(f"{TARGET} corrupt_data=flip,offset:0 dir={direction}"):
        breaks(database.ask)
    is_well(database)


@pytest.mark.parametrize(("direction", "offset"), [("to-server", 13), ("to-client", 45)])
def test_an_answer_is_wrong_on_an_old_connection(proxy, proxied, old, direction, offset):
    # Where the first letter lies in the messages Query, and RowDescription with DataRow.
    with proxy.toxic("corrupt_data", STREAM[direction], offset=offset):
        try:
            answer = old.ask("select 'hello'")
            assert answer != "hello" and answer[1:] == "ello"
        except (psycopg2.DataError, UnicodeDecodeError):
            pass  # One bit of eight makes it no text at all, which is told; the connection goes on.
    assert old.ask("select 'hello'") == "hello"
    is_well(proxied)


# 7. Sending and receiving is late.


@BOTH
def test_data_is_late(fault, database, direction):
    with fault(f"{TARGET} latency=300ms dir={direction}"):
        assert takes(database.ask, "select 3", 0.6) == "3", "the log-in and the query"
    is_well(database)


def test_packets_are_late(fault, database):
    with fault(f"{TARGET} delay=100ms"):
        assert takes(database.ask, "select 3", 0.6) == "3", "three round trips at the least"
    is_well(database)


@BOTH
def test_data_of_an_old_connection_is_late(proxy, proxied, old, direction):
    with proxy.toxic("latency", STREAM[direction], latency=300):
        assert takes(old.ask, "select 3", 0.3) == "3"
    assert old.ask("select 4") == "4"
    is_well(proxied)


# 8. The line is narrow.


@BOTH
def test_the_line_is_narrow(fault, database, direction):
    query, answer = long_query(direction)
    with fault(f"{TARGET} bandwidth=50KiB/s dir={direction}"):
        assert takes(database.ask, query, 0.7) == answer
    is_well(database)


@BOTH
def test_the_line_of_an_old_connection_is_narrow(proxy, proxied, old, direction):
    query, answer = long_query(direction)
    with proxy.toxic("bandwidth", STREAM[direction], rate=50):
        assert takes(old.ask, query, 0.7) == answer
    assert old.ask("select 4") == "4"
    is_well(proxied)


# 9. Connections are closed by a timer.


def test_a_timer_closes_connections(fault, database):
    with fault(f"{TARGET} lifetime=300ms"):
        connection = database.connect()
        assert connection.ask("select 1") == "1"
        assert connection.ends(), "though it is idle"
    is_well(database)


def test_a_timer_closes_an_old_connection(proxy, proxied, old):
    with proxy.toxic("lifetime", time=300):
        assert old.ends(), "though it is idle"
    is_well(proxied)


# 10. Data comes in slices.


@BOTH
def test_data_comes_in_slices(fault, database, direction):
    query, answer = long_query(direction)
    with fault(f"{TARGET} slicer=1000,delay:10ms dir={direction}"):
        assert takes(database.ask, query, 0.5) == answer
    is_well(database)


@BOTH
def test_data_of_an_old_connection_comes_in_slices(proxy, proxied, old, direction):
    query, answer = long_query(direction)
    with proxy.toxic("slicer", STREAM[direction], average_size=1000, delay=10_000):
        assert takes(old.ask, query, 0.5) == answer
    assert old.ask("select 4") == "4"
    is_well(proxied)
