"""The mistake, in a service that runs: its one connection is never replaced, dead as it is.

127.0.0.1:7100 answers GET / with what 127.0.0.1:7002 says; probe.py asks it.
"""

import http.server
import socket
import threading

from common import LINES, ping

connection = socket.create_connection(LINES, timeout=0.5)
lock = threading.Lock()


class Front(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            with lock:
                works = ping(connection)
        except OSError:
            works = False
        self.send_response(200 if works else 500)
        self.end_headers()

    def log_message(self, *words):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 7100), Front)
print("ready", flush=True)
server.serve_forever()
