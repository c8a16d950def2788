"""A cached error, fixed: only answers are cached."""

import socket

from common import LINES, ping, session

cache = {}


def answer(minute):
    if minute not in cache:
        try:
            with socket.create_connection(LINES, timeout=0.5) as connection:
                cache[minute] = ping(connection)
        except OSError:
            return False
    return cache[minute]


session(lambda: answer(minute=0))
