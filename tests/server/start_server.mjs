// Starts the real program on a free port and waits until it is ready.
import { spawn } from "node:child_process";

export async function startServer(binary, flags, environment = {}) {
  const child = spawn(binary, ["serve", "--port", "0", "--log-format", "json", ...flags],
    { stdio: ["ignore", "ignore", "pipe"], env: { ...process.env, ...environment } });
  let log = "";
  const exited = new Promise((resolve) => child.on("exit", (code, signal) => resolve({ code, signal })));
  const url = await new Promise((resolve, reject) => {
    child.stderr.on("data", (bytes) => {
      log += bytes;
      const listening = /listening on (http:\S+?)"/.exec(log);
      if (listening && /"event":"ready"/.test(log)) resolve(listening[1]);
    });
    exited.then(() => reject(new Error("the server ended early:\n" + log)));
  });
  return { url, child, exited, log: () => log,
    stop: async () => { child.kill("SIGTERM"); return exited; } };
}

let passed = 0;
export function check(holds, what, ...values) {
  if (!holds) {
    console.error("FAILED: " + what, ...values);
    process.exitCode = 1;
    throw new Error(what);
  }
  ++passed;
}
export const checksPassed = () => passed;
