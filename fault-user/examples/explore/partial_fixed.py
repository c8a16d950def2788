"""A partial response, fixed: the length that was announced is checked, and the content."""

import socket
import zlib

from common import LINES, fail


def items():
    try:
        with socket.create_connection(LINES, timeout=1) as connection:
            connection.sendall(b"ITEMS\n")
            connection.shutdown(socket.SHUT_WR)
            data = b"".join(iter(lambda: connection.recv(4096), b""))
        head, payload = data.split(b"\n", 1)
        length, checksum = map(int, head.split())
        if length != len(payload) or checksum != zlib.crc32(payload):
            return None
        return payload.split(b",")
    except (OSError, ValueError):
        return None


found = items()
if found is not None and len(found) != 1000:
    fail(f"{len(found)} items are stored, as if these were all")
print("stored" if found else "nothing to store")
