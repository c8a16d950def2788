"""A server of ordinary make: server.py http PORT, or server.py tls PORT CERTIFICATE"""

import http.server
import os
import socket
import socketserver
import ssl
import sys


class Http(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"well")

    def log_message(self, *arguments):
        pass


class Tls(socketserver.StreamRequestHandler):
    def setup(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[3])
        self.request = context.wrap_socket(self.request, server_side=True)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        """Connections that break are what this is about."""


Server((os.environ.get("HOST", "127.0.0.1"), int(sys.argv[2])), {"http": Http, "tls": Tls}[sys.argv[1]]).serve_forever()
