"""Endless retries, fixed: a few, with a growing pause."""

import socket
import time

from common import LINES, ping


def greet():
    for attempt in range(3):
        try:
            with socket.create_connection(LINES, timeout=1) as connection:
                return ping(connection)
        except OSError:
            time.sleep(0.1 * 2**attempt)
    return None


print(greet() or "nobody there")
