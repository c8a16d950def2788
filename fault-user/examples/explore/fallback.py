"""The mistake: there is a secondary, but only for a primary that refuses, not for one that is silent."""

import http.client


def price(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/price")
    return connection.getresponse().read()


try:
    print(price(7000))
except (OSError, http.client.HTTPException):
    print(price(7001), "says the secondary")
