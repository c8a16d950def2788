"""The mistake: an error is cached like an answer."""

import functools
import socket

from common import LINES, ping, session


@functools.cache
def answer(minute):
    try:
        with socket.create_connection(LINES, timeout=0.5) as connection:
            return ping(connection)
    except OSError:
        return False


session(lambda: answer(minute=0))
