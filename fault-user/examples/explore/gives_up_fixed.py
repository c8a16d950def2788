"""Giving up, fixed: attempts get rare, but never end."""

import socket
import time

from common import LINES, ping, session

state = {"connection": None, "failed": 0, "next": 0.0}


def use():
    try:
        if state["connection"] is None:
            if time.monotonic() < state["next"]:
                return False
            state["connection"] = socket.create_connection(LINES, timeout=0.5)
        works = ping(state["connection"])
        state["failed"] = 0
        return works
    except OSError:
        state["connection"] = None
        state["failed"] += 1
        state["next"] = time.monotonic() + min(0.5, 0.05 * 2 ** state["failed"])
        return False


session(use)
