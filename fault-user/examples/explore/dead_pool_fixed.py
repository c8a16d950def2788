"""A dead pooled connection, fixed: what fails is thrown away."""

import socket

from common import LINES, ping, session

pool = []


def use():
    try:
        if not pool:
            pool.append(socket.create_connection(LINES, timeout=0.5))
        return ping(pool[0])
    except OSError:
        pool.clear()
        return False


session(use)
