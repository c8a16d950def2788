"""The mistake: the pooled connection is never replaced, dead as it is."""

import socket

from common import LINES, ping, session

pool = []


def use():
    try:
        if not pool:
            pool.append(socket.create_connection(LINES, timeout=0.5))
        return ping(pool[0])
    except OSError:
        return False


session(use)
