"""The third party: payments.py PORT answers every request at once, and knows nothing of what happens on the way."""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """One payment. Connections stay open, as those of a real API do."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        """Takes it."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Nobody reads it."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
