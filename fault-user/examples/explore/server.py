"""The services that the examples depend on, on 127.0.0.1:

7000  HTTP: GET /price, POST and GET /orders, DELETE /orders
7001  the same, in another process of thought: the secondary of a fallback, or something optional
7002  lines: PING is answered by PONG, ITEMS by `LENGTH CRC` and a payload
7053  a toy name server (UDP): a query is answered by the next of two addresses, 127.0.0.2 and 127.0.0.3, where 7002
      is served too
"""

import http.server
import json
import socketserver
import threading
import zlib

ITEMS = b",".join(b"%d" % number for number in range(1000))
ADDRESSES = [b"127.0.0.2", b"127.0.0.3"]
orders = {}
queries = [0]


class Http(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, what):
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(len(orders) if self.path == "/orders" else {"price": 42, "of": "a long description" * 20})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers.get("Idempotency-Key", len(orders))
        orders[key] = body
        self.reply("thank you for your order, it will be with you soon")

    def do_DELETE(self):
        """Begins anew: nothing is ordered, and the name server begins with its first address."""
        orders.clear()
        queries[0] = 0
        self.reply("done")

    def log_message(self, *words):
        pass


class Lines(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"PING\n":
                self.wfile.write(b"PONG\n")
            elif line == b"ITEMS\n":
                self.wfile.write(b"%d %d\n" % (len(ITEMS), zlib.crc32(ITEMS)) + ITEMS)


class Names(socketserver.BaseRequestHandler):
    def handle(self):
        answer = ADDRESSES[queries[0] % len(ADDRESSES)]
        queries[0] += 1
        self.request[1].sendto(answer, self.client_address)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients go away: that is what this is about."""


def main():
    servers = [
        Server(("127.0.0.1", 7000), Http),
        Server(("127.0.0.1", 7001), Http),
        *(Server((host, 7002), Lines) for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3")),
        socketserver.ThreadingUDPServer(("127.0.0.1", 7053), Names),
    ]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()


main()
