// The published Testcontainers module for Toxiproxy, with fault's image: node testcontainers.mjs IMAGE SERVER-IMAGE PAGE
import { createRequire } from "node:module";
import assert from "node:assert/strict";

const require = createRequire(process.cwd() + "/");
const { GenericContainer, Network } = require("testcontainers");
const { ToxiProxyContainer } = require("@testcontainers/toxiproxy");
const [image, serverImage, page] = process.argv.slice(2);

const network = await new Network().start();
const server = await new GenericContainer(serverImage)
  .withCommand(["httpd", "-f", "-p", "80", "-h", "/www"])
  .withNetwork(network)
  .withNetworkAliases("server")
  .start();
const toxiproxy = await new ToxiProxyContainer(image).withNetwork(network).start();
const proxy = await toxiproxy.createProxy({ name: "web", upstream: "server:80" });

async function get() {
  const start = performance.now();
  const answer = await fetch(`http://${proxy.host}:${proxy.port}/`);
  assert.equal(await answer.text(), page);
  return performance.now() - start;
}

await get();
const latency = { latency: 700, jitter: 0 };
const toxic = await proxy.instance.addToxic({
  name: "late", type: "latency", stream: "downstream", toxicity: 1, attributes: latency,
});
assert((await get()) >= 700);
await toxic.remove();
await proxy.setEnabled(false);
await assert.rejects(get());
await proxy.setEnabled(true);
await get();
await toxiproxy.stop();
await server.stop();
await network.stop();
console.log("driven");
