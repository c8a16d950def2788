"""What the examples share: asking, and how a test ends.

An example is a test that should pass whatever a dependency does. Where the dependency can't be used the application has to
say so in time; that is no failure. It is one when the dependency is well and the application can't use it.
"""

import socket
import sys
import time

LINES = ("127.0.0.1", 7002)


def fail(why):
    sys.exit(f"FAILED: {why}")


def ping(connection):
    """Whether PING is answered by PONG."""
    connection.sendall(b"PING\n")
    answer = b""
    while not answer.endswith(b"\n"):
        data = connection.recv(100)
        if not data:
            raise ConnectionError("closed in the middle of an answer")
        answer += data
    return answer == b"PONG\n"


def is_well(address=LINES):
    """Asks by a connection of its own, as a health check would."""
    try:
        with socket.create_connection(address, timeout=0.5) as connection:
            return ping(connection)
    except OSError:
        return False


def session(use, seconds=3.0):
    """Uses something again and again; in the end it has to work, unless the service itself does not."""
    end = time.monotonic() + seconds
    works = False
    while time.monotonic() < end:
        works = use()
        time.sleep(0.1)
    for _ in range(6):
        works = works or use()
        time.sleep(0 if works else 0.2)
    if not works and is_well():
        fail("the service is well, and is not used any more")
    print("works" if works else "does without the service")
