// Applies a rule and prints the process of `fault`. Removes it at the end of the input, unless told to forget it.

import { execFileSync } from "node:child_process";
import { text } from "node:stream/consumers";

import { applyFault } from "fault-test";

const fault = await applyFault(process.argv[2], { allowUnfired: true });
const children = execFileSync("pgrep", ["--parent", String(process.pid), "--newest", "fault"]);
process.stdout.write(children);
if ((await text(process.stdin)) !== "forget\n") {
  await fault.remove();
}
