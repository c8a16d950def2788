// The package against the program `fault`, on an echo server in this process.

import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { createServer, connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { promisify } from "node:util";
import { Worker } from "node:worker_threads";

import { applyFault, FaultError, faultUnavailable, withFault } from "fault-test";

const skip = faultUnavailable();
const run = promisify(execFile);
const ROOT = new URL("..", import.meta.url).pathname;

let server;
let port;

before(async () => {
  server = createServer((socket) => socket.on("error", () => {}).pipe(socket)).listen(0, "127.0.0.1");
  await once(server, "listening");
  port = server.address().port;
});

after(() => server.close());

async function roundTrip() {
  const start = performance.now();
  const socket = connect(port, "127.0.0.1");
  socket.write("hello");
  await once(socket, "data");
  socket.destroy();
  return performance.now() - start;
}

const isRefused = { code: "ECONNREFUSED" };

test("rules act while the function runs", { skip }, async () => {
  const result = await withFault([`tcp:${port} latency=200ms`], async () => {
    // Less the clock's error.
    assert.ok((await roundTrip()) >= 380);
    return "result";
  });
  assert.equal(result, "result");
  await withFault(`tcp:${port} reject`, () => assert.rejects(roundTrip(), isRefused));
  await roundTrip();
});

test("they act on children and not on other processes", { skip }, async () => {
  const script = `import("node:net").then((net) => net.connect(${port}, "127.0.0.1").on("error",
    (error) => console.log(error.code)).on("connect", () => process.exit()))`;
  await withFault(`tcp:${port} reject`, async () => {
    const { stdout } = await run(process.execPath, ["-e", script]);
    assert.equal(stdout, "ECONNREFUSED\n");
  });
  const holder = spawn(process.execPath, [join(ROOT, "helpers/hold.js"), `tcp:${port} reject`]);
  holder.stderr.pipe(process.stderr);
  await once(holder.stdout, "data");
  await roundTrip();
  holder.stdin.end();
  const [code] = await once(holder, "close");
  assert.equal(code, 0);
});

test("a rule that never fired is an error of one line", { skip }, async () => {
  await assert.rejects(withFault("tcp:9 drop", () => {}), (error) => {
    assert.ok(error instanceof FaultError);
    assert.match(error.message, /^.*rule `tcp:9 drop` never fired: .*$/);
    assert.equal(error.exitCode, 120);
    assert.match(error.output, /0 pkts/);
    return true;
  });
  await withFault("tcp:9 drop", () => {}, { allowUnfired: true });
});

test("the function's own error comes first", { skip }, async () => {
  const fails = () => {
    throw new RangeError("of the test");
  };
  await assert.rejects(withFault("tcp:9 drop", fails), RangeError);
  await roundTrip();
});

test("mistakes are errors of one line", { skip }, async () => {
  const is = (pattern) => (error) =>
    error instanceof FaultError && pattern.test(error.message) && !error.message.includes("\n");
  const nothing = () => assert.fail("it does not run");
  await assert.rejects(withFault("tcp:9 dropp", nothing), is(/`dropp`.*did you mean `drop`/));
  await assert.rejects(withFault([], nothing), is(/no rule/));
  await assert.rejects(withFault([5], nothing), is(/a rule is a string, not 5/));
  await assert.rejects(withFault("tcp:9 drop", nothing, { sed: 1 }), is(/unknown option sed/));
  const options = ["--interface", "none-such"];
  await assert.rejects(withFault("tcp:9 drop", nothing, { options }), is(/none-such/));
  await assert.rejects(withFault("tcp:9 drop", nothing, { seed: "x" }), is(/seed/));
});

test("calls may be nested, but not overlap", { skip }, async () => {
  const lenient = { allowUnfired: true };
  await withFault(`tcp:${port} latency=100ms`, async () => {
    await withFault(`tcp:${port} reject`, () => assert.rejects(roundTrip(), isRefused));
    await roundTrip();
  });
  let second;
  await withFault("tcp:9 drop", () => undefined, lenient);
  const first = withFault("tcp:9 drop", () => second.catch(() => {}), lenient);
  second = withFault("tcp:10 drop", () => assert.fail("it does not run"), lenient);
  await assert.rejects(second, /not overlap: `tcp:9 drop` is still applied/);
  await first;
});

test("applyFault, for beforeEach and afterEach", { skip }, async () => {
  const outer = await applyFault(`tcp:${port} delay=50ms`);
  assert.ok((await roundTrip()) >= 95);
  const inner = await applyFault("tcp:9 drop", { allowUnfired: true });
  await withFault(`tcp:${port} reject`, () => assert.rejects(roundTrip(), isRefused));
  await assert.rejects(outer.remove(), /reverse order: remove `tcp:9 drop` first/);
  await inner.remove();
  const summary = await outer.remove();
  assert.match(summary, /delay=50ms/);
  assert.equal(await outer.remove(), summary);
  await roundTrip();
});

test("a report, and the seed", { skip }, async () => {
  const folder = await mkdtemp(join(tmpdir(), "fault-test-"));
  const report = join(folder, "a", "b");
  await withFault(`tcp:${port} delay=1ms`, roundTrip, { seed: 7, report });
  const written = JSON.parse(await readFile(join(report, "report.json"), "utf8"));
  assert.equal(written.seed, 7);
  assert.equal(written.rules[0].fired, true);
  await rm(folder, { recursive: true });
});

test("a process that ends leaves no rules", { skip }, async () => {
  const rule = `tcp:${port} reject`;
  for (const end of [(held) => held.kill("SIGKILL"), (held) => held.stdin.end("forget\n")]) {
    const holder = spawn(process.execPath, [join(ROOT, "helpers/hold.js"), rule]);
    const [data] = await once(holder.stdout, "data");
    const ended = run("tail", ["--pid", String(data).trim(), "-f", "/dev/null"]);
    end(holder);
    await once(holder, "close");
    await ended;
  }
});

test("threads are rejected", { skip }, async () => {
  const worker = new Worker(
    `import("fault-test").then((fault) => fault.withFault("tcp:9 drop", () => {})).catch((error) =>
      require("node:worker_threads").parentPort.postMessage(error.message))`,
    { eval: true },
  );
  const [message] = await once(worker, "message");
  assert.match(message, /--pool=forks/);
});

test("without the program or its rights there is a reason to skip", async () => {
  const script = 'import("fault-test").then((fault) => console.log(fault.faultUnavailable()))';
  const options = { cwd: ROOT, env: { ...process.env, FAULT: "/none/such", FAULT_REQUIRED: "" } };
  const missing = await run(process.execPath, ["-e", script], options);
  assert.equal(missing.stdout, "FAULT=/none/such is not a program\n");
  options.env.FAULT_REQUIRED = "1";
  await assert.rejects(run(process.execPath, ["-e", script], options), /is not a program/);
  options.env = { ...process.env, PATH: "/none", FAULT: "", FAULT_REQUIRED: "" };
  const absent = await run(process.execPath, ["-e", script], options);
  assert.match(absent.stdout, /^fault is not installed: put it in PATH/);
});
