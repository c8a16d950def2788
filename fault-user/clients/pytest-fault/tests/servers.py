"""Fixtures for the tests, and for the tests that these run in a pytest of their own."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

PATIENCE = 30.0
"""A test fails when something takes more than so many seconds."""


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while data := self.request.recv(65_536):
                self.request.sendall(data)
        except ConnectionError:
            pass  # A fault may have reset it.


class Server(socketserver.ThreadingTCPServer):
    """An echo server on a free port of loopback."""

    daemon_threads = True

    @property
    def port(self) -> int:
        """The port."""
        return int(self.server_address[1])

    def connect(self) -> socket.socket:
        """Open a connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def round_trip(self, connection: socket.socket | None = None) -> float:
        """Return how many seconds an exchange takes; without a connection, on a new one."""
        start = time.monotonic()
        if connection is None:
            with self.connect() as fresh:
                return self.round_trip(fresh)
        connection.sendall(b"hello")
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
        return time.monotonic() - start


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Run an echo server in this process."""
    with Server(("127.0.0.1", 0), _Echo) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()
