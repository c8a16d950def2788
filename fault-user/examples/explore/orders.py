"""For --before and --check: `reset` has the services begin anew, `check` fails when something was ordered twice."""

import http.client
import sys


def ask(method):
    connection = http.client.HTTPConnection("127.0.0.1", 7000, timeout=5)
    connection.request(method, "/orders")
    return connection.getresponse().read()


if sys.argv[1] == "reset":
    ask("DELETE")
elif int(ask("GET")) > 1:
    sys.exit("ordered twice")
