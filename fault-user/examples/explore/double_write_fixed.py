"""A retry that writes twice, fixed: the server is told that it is the same order."""

import http.client
import uuid


def order():
    key = {"Idempotency-Key": str(uuid.uuid4())}
    for _ in range(2):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", 7000, timeout=1)
            connection.request("POST", "/orders", b"one pizza", key)
            if connection.getresponse().read():
                return "ordered"
        except (OSError, http.client.HTTPException):
            continue
    return "try again later"


print(order())
