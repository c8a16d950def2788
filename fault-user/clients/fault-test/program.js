// Finds the program `fault` and the rights to run it.

import { spawnSync } from "node:child_process";
import { accessSync, constants, statSync } from "node:fs";
import { delimiter, join, resolve } from "node:path";

/** @typedef {{ command: string[] } | { reason: string }} Found */

/** @type {Found | undefined} */
let found;

/**
 * The words that start `fault`, or the reason why it can't be started.
 *
 * @returns {Found}
 */
export function findCommand() {
  found ??= search();
  return found;
}

/** @returns {Found} */
function search() {
  const named = process.env.FAULT;
  const program = lookUp(named || "fault");
  if (program === undefined) {
    const reason = named
      ? `FAULT=${named} is not a program`
      : "fault is not installed: put it in PATH, or set FAULT to its path";
    return { reason };
  }
  let reason = lacks([program]);
  if (reason === undefined) {
    return { command: [program] };
  }
  if (process.geteuid?.() !== 0 && lookUp("sudo")) {
    const withSudo = ["sudo", "-n", program];
    const withSudoReason = lacks(withSudo);
    if (withSudoReason === undefined) {
      return { command: withSudo };
    }
    reason += ` (tried: ${withSudoReason})`;
  }
  return { reason: `fault can't act here: ${reason}` };
}

/**
 * @param {string} name
 * @returns {string | undefined}
 */
function lookUp(name) {
  const folders = name.includes("/") ? [""] : (process.env.PATH ?? "").split(delimiter);
  return folders.map((folder) => resolve(join(folder, name))).find(isProgram);
}

/** @param {string} path */
function isProgram(path) {
  try {
    accessSync(path, constants.X_OK);
    return statSync(path).isFile();
  } catch {
    return false;
  }
}

/**
 * What this command lacks to limit rules to a process tree; `undefined` if nothing.
 *
 * @param {string[]} command
 * @returns {string | undefined}
 */
function lacks([program, ...words]) {
  const done = spawnSync(program, [...words, "doctor", "--json"], { encoding: "utf8" });
  let checks;
  try {
    checks = JSON.parse(done.stdout).system;
  } catch {
    return oneLine(done.stderr ?? "") || `\`${program} doctor\` printed no result`;
  }
  const needed = ["bpf(2)", "cgroup2"];
  const missing = checks.find((check) => needed.includes(check.name) && !check.ok);
  return missing?.detail ?? (done.status === 0 ? undefined : "see `fault doctor`");
}

/**
 * Joins the lines of a message of `fault`, without the carets that point into an excerpt.
 *
 * @param {string} text
 */
export function oneLine(text) {
  const lines = text.split("\n").map((line) => line.trim());
  return lines.filter((line) => !/^[\^ ]*$/.test(line)).join("; ");
}
