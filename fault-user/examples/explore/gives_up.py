"""The mistake: after a few attempts the client stops reconnecting for good, as NATS clients do by default."""

import socket

from common import LINES, ping, session

ATTEMPTS = 5
state = {"connection": None, "failed": 0}


def use():
    try:
        if state["connection"] is None:
            if state["failed"] >= ATTEMPTS:
                return False
            state["connection"] = socket.create_connection(LINES, timeout=0.5)
        state["failed"] = 0
        return ping(state["connection"])
    except OSError:
        state["connection"] = None
        state["failed"] += 1
        return False


session(use)
