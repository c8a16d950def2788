"""A fallback, fixed: silence is a reason for it, too."""

import http.client


def price(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    connection.request("GET", "/price")
    return connection.getresponse().read()


try:
    print(price(7000))
except (OSError, http.client.HTTPException):
    print(price(7001), "says the secondary")
