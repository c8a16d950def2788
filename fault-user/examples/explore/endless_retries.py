"""The mistake: retries without an end and without a pause."""

import socket

from common import LINES, ping


def greet():
    while True:
        try:
            with socket.create_connection(LINES, timeout=1) as connection:
                return ping(connection)
        except OSError:
            continue


print(greet())
