"""The mistake: what is optional is required at the start."""

import socket

from common import LINES, ping

with socket.create_connection(LINES, timeout=1) as metrics:
    ping(metrics)
print("started")
