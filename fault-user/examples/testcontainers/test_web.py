"""What a client of a container meets when the network between them fails."""

import time
from urllib.error import URLError

import pytest
from conftest import Web
from pytest_fault import Faults


def seconds(web: Web) -> float:
    """Return how long a request takes."""
    start = time.monotonic()
    assert web.get() == "well"
    return time.monotonic() - start


def test_a_slow_network(web: Web, fault: Faults) -> None:
    # A stream fault acts on what the client dials: the published port, which is known only now.
    with fault(f"tcp:{web.port} latency=300ms"):
        assert seconds(web) >= 0.55, "there and back"


@pytest.mark.fault("tcp:80 delay=100ms")
def test_slow_packets(web: Web) -> None:
    # Docker changes the address of packets before they reach an interface: there they have the
    # container's own port.
    assert seconds(web) >= 0.35, "the handshake, and the request"


def test_a_server_that_is_down(web: Web, fault: Faults) -> None:
    with fault("tcp:80 reject"):
        with pytest.raises(URLError, match="refused"):
            web.get()
    assert web.get() == "well"
