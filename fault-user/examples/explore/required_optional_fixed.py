"""A requirement that is none, fixed: it starts without."""

import socket

from common import LINES, ping

try:
    with socket.create_connection(LINES, timeout=1) as metrics:
        ping(metrics)
except OSError:
    print("started without metrics")
else:
    print("started")
