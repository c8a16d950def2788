// Drives a daemon with the published toxiproxy-node-client: node driver.mjs API-URL UPSTREAM
import { createRequire } from "node:module";
import { connect } from "node:net";
import assert from "node:assert/strict";

const { Toxiproxy } = createRequire(process.cwd() + "/")("toxiproxy-node-client");
const [url, upstream] = process.argv.slice(2);
const toxiproxy = new Toxiproxy(url);

function open(listen) {
  const [host, port] = listen.split(":");
  const socket = connect(Number(port), host);
  socket.setNoDelay(true);
  return socket;
}

function roundTrip(socket) {
  const start = performance.now();
  return new Promise((resolve, reject) => {
    socket.once("data", () => resolve(performance.now() - start));
    socket.once("error", reject);
    socket.once("close", () => reject(new Error("closed")));
    socket.write("x");
  });
}

// A busy machine makes some late: one that comes in time is proof.
async function comesWithin(socket, most) {
  const all = [];
  while (all.length < 100) {
    const took = await roundTrip(socket);
    if (took < most) return took;
    all.push(took);
  }
  assert.fail(`none within ${most} ms: ${all.join(" ")}`);
}

const proxy = await toxiproxy.createProxy({ name: "node", listen: "127.0.0.1:0", upstream });
const socket = open(proxy.listen);
await comesWithin(socket, 100);

const latency = await proxy.addToxic({ name: "slow", type: "latency", stream: "downstream", toxicity: 1, attributes: { latency: 150, jitter: 0 } });
assert.equal(latency.name, "slow");
assert((await roundTrip(socket)) >= 149, "the old connection is slow");
await latency.update({ toxicity: 1, attributes: { latency: 20, jitter: 0 } });
const faster = await comesWithin(socket, 120);
assert(faster >= 19, `${faster} ms after the update`);
assert.equal((await proxy.getToxic("slow")).attributes.latency, 20);
await latency.remove();
await comesWithin(socket, 19);
await assert.rejects(proxy.getToxic("slow"));

const off = await proxy.update({ enabled: false, listen: proxy.listen, upstream });
assert.equal(off.enabled, false);
await assert.rejects(roundTrip(open(proxy.listen)));
await toxiproxy.reset();
const again = await toxiproxy.get("node");
assert.equal(again.enabled, true);
const fresh = open(again.listen);
await comesWithin(fresh, 100);

await assert.rejects(toxiproxy.createProxy({ name: "node", listen: "127.0.0.1:0", upstream }));
const made = await toxiproxy.populate([{ name: "other", listen: "127.0.0.1:0", upstream, enabled: true }]);
assert.deepEqual(Object.keys(made), ["other"]);
assert.deepEqual(Object.keys(await toxiproxy.getAll()).sort(), ["node", "other"]);
await again.remove();
await assert.rejects(toxiproxy.get("node"));
console.log("driven", await toxiproxy.getVersion());
process.exit(0);
