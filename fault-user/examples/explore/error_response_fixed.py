"""An error response, fixed: the status is looked at, and what can't be parsed is no answer."""

import http.client
import json


def price():
    try:
        connection = http.client.HTTPConnection("127.0.0.1", 7000, timeout=1)
        connection.request("GET", "/price")
        answer = connection.getresponse()
        body = answer.read()
        return json.loads(body)["price"] if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return None


print(price() or "the price is not known")
