"""The mistake: an order is sent again when no answer came, though the first one may have arrived."""

import http.client


def order():
    for _ in range(2):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", 7000, timeout=1)
            connection.request("POST", "/orders", b"one pizza")
            if connection.getresponse().read():
                return "ordered"
        except (OSError, http.client.HTTPException):
            continue
    return "try again later"


print(order())
