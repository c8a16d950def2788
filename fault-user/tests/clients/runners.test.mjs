// fault-test in jest and vitest, with their globals.

import { once } from "node:events";
import { connect, createServer } from "node:net";

import { faultUnavailable, withFault } from "fault-test";

const maybe = faultUnavailable() ? test.skip : test;

async function withServer(fn) {
  const server = createServer((socket) => socket.on("error", () => {})).listen(0, "127.0.0.1");
  await once(server, "listening");
  try {
    await fn(server.address().port);
  } finally {
    server.close();
  }
}

async function dial(port) {
  const socket = connect(port, "127.0.0.1");
  await once(socket, "connect");
  socket.destroy();
}

maybe("a fault acts", () =>
  withServer(async (port) => {
    await withFault(`tcp:${port} reject`, () =>
      expect(dial(port)).rejects.toMatchObject({ code: "ECONNREFUSED" }),
    );
    await dial(port);
  }),
  60_000,
);

maybe("a fault that never fired is an error", async () => {
  await expect(withFault("tcp:9 drop", () => {})).rejects.toThrow("`tcp:9 drop` never fired");
}, 60_000);
