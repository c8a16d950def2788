"""The mistake: what has come when the connection ends is taken for the whole."""

import socket

from common import LINES, fail


def items():
    try:
        with socket.create_connection(LINES, timeout=1) as connection:
            connection.sendall(b"ITEMS\n")
            connection.shutdown(socket.SHUT_WR)
            data = b"".join(iter(lambda: connection.recv(4096), b""))
        return data.split(b"\n", 1)[1].split(b",")
    except (OSError, IndexError):
        return None


found = items()
if found is not None and len(found) != 1000:
    fail(f"{len(found)} items are stored, as if these were all")
print("stored" if found else "nothing to store")
