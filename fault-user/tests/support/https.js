// A server of every name, over HTTP/2 and HTTP/1.1 with TLS: node https.js PORT CERTIFICATE
const fs = require("fs");
const http2 = require("http2");

const [port, file] = process.argv.slice(2);
const certificate = fs.readFileSync(file);
http2
  .createSecureServer(
    { key: certificate, cert: certificate, allowHTTP1: true },
    (request, response) => response.end("well"),
  )
  .listen(Number(port), "127.0.0.1");
