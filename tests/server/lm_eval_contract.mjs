// What lm-evaluation-harness's local-completions asks for, and whether the log-likelihoods that it
// would compute equal those of `indexcache logits`, which runs the model outside of the server.
// Usage: node lm_eval_contract.mjs PROGRAM MODEL
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { check, checksPassed, startServer } from "./start_server.mjs";

const [program, model] = process.argv.slice(2);
const folder = mkdtempSync(join(tmpdir(), "indexcache-lm-eval-"));
const server = await startServer(program, ["-m", model, "-c", "4096", "-t", "2", "--dtype", "f32", "--deterministic"]);
const call = async (path, body) => {
  const response = await fetch(server.url + path, body ? { method: "POST", body: JSON.stringify(body) } : {});
  check(response.ok, path, response.status, response.ok ? "" : await response.clone().text());
  return response.json();
};

// A scalar of a safetensors file.
function readScalar(path, name) {
  const bytes = readFileSync(path);
  const size = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + size).toString());
  return bytes.readDoubleLE(8 + size + header[name].data_offsets[0]);
}

try {
  const info = await call("/tokenizer_info");
  check(typeof info.eos_token === "string", "tokenizer_info", info);
  const texts = ["The indexer scores every token.", "Ein kurzer Satz.", "x", "def f(n):\n    return n * f(n - 1) if n else 1\n".repeat(40)];
  const prompts = [];
  for (const text of texts) {
    const { tokens } = await call("/tokenize", { prompt: text, add_special_tokens: false });
    check((await call("/detokenize", { tokens })).prompt === text, "detokenize", text);
    prompts.push(tokens.length > 1 ? tokens : [...tokens, ...tokens, ...tokens]);
  }
  const name = (await call("/v1/models")).data[0].id;
  const answer = await call("/v1/completions",
    { model: name, prompt: prompts, temperature: 0, max_tokens: 1, logprobs: 1, seed: 1234, echo: true });
  let worst = 0;
  for (const [i, ids] of prompts.entries()) {
    const choice = answer.choices.find((one) => one.index === i);
    const { token_logprobs: logprobs, top_logprobs: top } = choice.logprobs;
    check(logprobs.length === ids.length + 1 && top.length === logprobs.length && logprobs[0] === null, "lengths", logprobs.length, ids.length);
    for (let t = 1; t < logprobs.length; ++t) {
      const best = Math.max(...Object.values(top[t]));
      check(logprobs[t] <= best && Object.keys(top[t]).length <= 2, "top_logprobs", logprobs[t], top[t]);
    }
    check(logprobs.at(-1) === Math.max(...Object.values(top.at(-1))), "the generated token is the likeliest");
    writeFileSync(join(folder, "ids.json"), JSON.stringify(ids));
    const out = join(folder, `${i}.safetensors`);
    execFileSync(program, ["logits", "-m", model, "--tokens", join(folder, "ids.json"), "-o", out, "--dtype", "f32", "-t", "2"], { stdio: "ignore" });
    const expected = readScalar(out, "mean_nll");
    const found = -logprobs.slice(1, -1).reduce((a, b) => a + b, 0) / (ids.length - 1);
    worst = Math.max(worst, Math.abs(found - expected));
    check(Math.abs(found - expected) <= 1e-5, "log-likelihood", i, found, expected);
  }
  const until = await call("/v1/completions",
    { model: name, prompt: texts[0], max_tokens: 32, temperature: 0, stop: ["\n\n"], seed: 1234 });
  check(typeof until.choices[0].text === "string" && !until.choices[0].text.includes("\n\n"), "generate_until", until);
  check((await server.stop()).code === 0, "exit code");
  console.log(`lm_eval_contract: ${checksPassed()} checks passed, mean log-likelihoods differ by at most ${worst.toExponential(2)}`);
} catch (error) {
  console.error(error, "\n", server.log());
  process.exitCode = 1;
  server.child.kill("SIGKILL");
} finally {
  rmSync(folder, { recursive: true });
}
