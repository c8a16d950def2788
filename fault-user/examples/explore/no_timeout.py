"""The mistake: no timeout. A service that is silent hangs its caller."""

import http.client


def price():
    try:
        connection = http.client.HTTPConnection("127.0.0.1", 7000)
        connection.request("GET", "/price")
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return None


print(price() or "the price is not known")
