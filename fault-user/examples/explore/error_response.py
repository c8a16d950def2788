"""The mistake: an error is parsed as if it were the answer."""

import http.client
import json


def price():
    try:
        connection = http.client.HTTPConnection("127.0.0.1", 7000, timeout=1)
        connection.request("GET", "/price")
        body = connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return None
    return json.loads(body)["price"]


print(price() or "the price is not known")
