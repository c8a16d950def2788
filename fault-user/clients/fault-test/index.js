// Applies rules to the traffic of this process and its descendants, by `fault run --pid`.

import { AsyncLocalStorage } from "node:async_hooks";
import { spawn } from "node:child_process";
import { mkdirSync } from "node:fs";
import { resolve } from "node:path";
import { isMainThread } from "node:worker_threads";

import { findCommand, oneLine } from "./program.js";

// The rules last until this reads a line, or until this process ends.
const HOLD = "echo ready; read -r line; exit 0";

// The exit code of `fault run` when a rule never fired.
const UNFIRED = 120;

/** The applied faults of this process, in the order of application. */
const applied = [];

/** The fault that the running code was called under. */
const enclosing = new AsyncLocalStorage();

export class FaultError extends Error {
  name = "FaultError";

  constructor(message, { exitCode = null, output = "" } = {}) {
    super(message);
    this.exitCode = exitCode;
    this.output = output;
  }
}

export function faultUnavailable() {
  const { reason } = findCommand();
  if (reason !== undefined && process.env.FAULT_REQUIRED === "1") {
    throw new FaultError(reason);
  }
  return reason ?? false;
}

export async function withFault(rules, fn, options = {}) {
  const outer = applied.findLast((fault) => fault.isForBlock);
  if (outer !== enclosing.getStore()) {
    const still = outer ? `${quoted(outer)} is still applied` : "the outer one has ended";
    throw new FaultError(`calls of withFault may be nested, but not overlap: ${still}`);
  }
  const fault = start(rules, options, true);
  await fault.ready;
  let result;
  try {
    result = await enclosing.run(fault, fn);
  } catch (error) {
    // The test's own error is the one to show.
    await fault.remove().catch(() => {});
    throw error;
  }
  await fault.remove();
  return result;
}

export async function applyFault(rules, options = {}) {
  const fault = start(rules, options, false);
  await fault.ready;
  return fault;
}

/** Starts `fault` at once, so that the order is that of the calls. */
function start(rules, options, isForBlock) {
  if (!isMainThread) {
    throw new FaultError(
      "faults act on whole processes, but this test runs in a thread: use --pool=forks (vitest)",
    );
  }
  const fault = new Applied(checkRules(rules), options, isForBlock);
  applied.push(fault);
  return fault;
}

class Applied {
  #process;
  #output = "";
  #ended;
  #removed;

  constructor(rules, options, isForBlock) {
    this.rules = rules;
    this.isForBlock = isForBlock;
    const [program, ...words] = [...command(), ...argumentsOf(rules, options)];
    // In a session of its own: Ctrl-C is for the tests; the end of this process ends the rules.
    this.#process = spawn(program, words, { detached: true, stdio: "pipe" });
    this.#process.stderr.setEncoding("utf8").on("data", (text) => (this.#output += text));
    // `fault` may have ended already: its exit code says why.
    this.#process.stdin.on("error", () => {});
    this.#process.on("error", (error) => (this.#output += error.message));
    this.#ended = new Promise((ends) => this.#process.on("close", ends));
    this.ready = this.#becomesReady();
  }

  async #becomesReady() {
    const began = new Promise((begins) => this.#process.stdout.once("data", () => begins(true)));
    const ended = this.#ended.then(() => false);
    if (await Promise.race([began, ended])) {
      this.#keepAlive(false);
      return;
    }
    this.#forget();
    throw this.#error(oneLine(this.#output));
  }

  remove() {
    if (this.#removed === undefined && applied.at(-1) !== this) {
      const last = quoted(applied.at(-1));
      return Promise.reject(
        new FaultError(`faults are removed in reverse order: remove ${last} first`),
      );
    }
    this.#removed ??= this.#remove();
    return this.#removed;
  }

  async #remove() {
    this.#keepAlive(true);
    // A line, since a child of this process may hold the pipe open.
    this.#process.stdin.end("\n");
    const code = await this.#ended;
    this.#forget();
    if (code === UNFIRED) {
      throw this.#error(unfired(this.#output));
    }
    if (code !== 0) {
      throw this.#error(`fault ended early: ${oneLine(this.#output)}`);
    }
    return this.#output;
  }

  /** Whether this process waits for `fault` before it ends. */
  #keepAlive(is) {
    const { stdin, stdout, stderr } = this.#process;
    for (const handle of [this.#process, stdin, stdout, stderr]) {
      is ? handle.ref() : handle.unref();
    }
  }

  #forget() {
    applied.splice(applied.indexOf(this), 1);
  }

  #error(message) {
    return new FaultError(message, { exitCode: this.#process.exitCode, output: this.#output });
  }
}

function quoted(fault) {
  return fault.rules.map((rule) => `\`${rule}\``).join(", ");
}

function command() {
  const found = findCommand();
  if (found.reason !== undefined) {
    throw new FaultError(found.reason);
  }
  return found.command;
}

function argumentsOf(rules, { allowUnfired = false, seed, report, options = [], ...unknown }) {
  const names = Object.keys(unknown).join(", ");
  if (names !== "") {
    throw new FaultError(`unknown option ${names}: use allowUnfired, seed, report or options`);
  }
  const words = ["run", "--pid", String(process.pid)];
  const chosen = seed ?? process.env.FAULT_SEED;
  if (chosen !== undefined) {
    words.push(`--seed=${chosen}`);
  }
  if (report !== undefined) {
    mkdirSync(report, { recursive: true });
    words.push(`--report=${resolve(report)}`);
  }
  if (allowUnfired) {
    words.push("--allow-unfired");
  }
  words.push(...options, ...rules.flatMap((rule) => `--rule=${rule}`));
  return [...words, "--", "sh", "-c", HOLD];
}

function checkRules(rules) {
  const list = typeof rules === "string" ? [rules] : [...rules];
  const wrong = list.find((rule) => typeof rule !== "string");
  if (wrong !== undefined) {
    throw new FaultError(`a rule is a string, not ${JSON.stringify(wrong)}`);
  }
  if (list.length === 0) {
    throw new FaultError('no rule: give at least one, such as "tcp:5432 latency=200ms"');
  }
  return list;
}

function unfired(output) {
  const lines = output.split("\n").filter((line) => /rule `.*never fired/.test(line));
  return lines.join("\n") || "fault: a rule never fired, so the test did not test it";
}
