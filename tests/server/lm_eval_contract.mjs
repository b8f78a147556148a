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
let server;
const call = async (path, body) => {
  const response = await fetch(server.url + path, body ? { method: "POST", body: JSON.stringify(body) } : {});
  check(response.ok, path, response.status, response.ok ? "" : await response.clone().text());
  return response.json();
};

// The log-probability of each token after the first, from the logits that the program writes.
function expectedLogprobs(ids, flags) {
  writeFileSync(join(folder, "ids.json"), JSON.stringify(ids));
  const out = join(folder, "logits.safetensors");
  execFileSync(program, ["logits", "-m", model, "--tokens", join(folder, "ids.json"), "-o", out, "-t", "2", ...flags], { stdio: "ignore" });
  const bytes = readFileSync(out);
  const size = Number(bytes.readBigUInt64LE(0));
  const { shape: [, vocab], data_offsets: [begin] } = JSON.parse(bytes.subarray(8, 8 + size).toString()).logits;
  return ids.slice(1).map((id, t) => {
    const row = Array.from({ length: vocab }, (_, v) => bytes.readFloatLE(8 + size + begin + 4 * (t * vocab + v)));
    const top = Math.max(...row);
    return row[id] - top - Math.log(row.reduce((sum, logit) => sum + Math.exp(logit - top), 0));
  });
}

// Each log-probability is compared, and their sum over a continuation, which is what is scored. Both
// are the program's up to the last places of a double: where the products of a prompt alone are, and
// with --deterministic always. Without it, prompts that share a forward pass are multiplied in other
// blocks, and the sum of a long text may differ by 1e-5 for each of its tokens.
function compare(ids, choice, expected, mode) {
  const { token_logprobs: logprobs, top_logprobs: top } = choice.logprobs;
  check(logprobs.length === ids.length + 1 && top.length === logprobs.length && logprobs[0] === null, "lengths", logprobs.length, ids.length);
  for (let t = 1; t < logprobs.length; ++t) {
    const best = Math.max(...Object.values(top[t]));
    check(logprobs[t] <= best && Object.keys(top[t]).length <= 2, "top_logprobs", logprobs[t], top[t]);
  }
  check(logprobs.at(-1) === Math.max(...Object.values(top.at(-1))), "the generated token is the likeliest");
  const found = logprobs.slice(1, -1);
  const worst = Math.max(...found.map((value, t) => Math.abs(value - expected[t])));
  const bound = mode.together && !mode.deterministic ? 1e-5 : 1e-12;
  check(worst <= bound, "log-probability of a token", mode.name, worst);
  const context = Math.floor(found.length / 2);
  const sum = (list) => list.slice(context).reduce((a, b) => a + b, 0);
  const difference = Math.abs(sum(found) - sum(expected));
  check(difference <= bound * (found.length - context), "log-likelihood", mode.name, sum(found), sum(expected));
  return difference;
}

const texts = ["The indexer scores every token.", "Ein kurzer Satz.", "x", "def f(n):\n    return n * f(n - 1) if n else 1\n".repeat(40)];
const modes = [
  { name: "f32, one by one", flags: ["--dtype", "f32"], serve: [] },
  { name: "as shipped, one by one", flags: [], serve: [] },
  { name: "f32, together", flags: ["--dtype", "f32"], serve: [], together: true },
  { name: "f32, together, deterministic", flags: ["--dtype", "f32"], serve: ["--log-prompts"], together: true, deterministic: true },
  { name: "as shipped, together, deterministic", flags: [], serve: [], together: true, deterministic: true },
];
const worst = {};
try {
  const expected = {};
  for (const mode of modes) {
    const deterministic = mode.deterministic ? ["--deterministic"] : [];
    server = await startServer(program, ["-m", model, "-c", "4096", "-t", "2", ...mode.flags, ...mode.serve, ...deterministic]);
    const info = await call("/tokenizer_info");
    check(typeof info.eos_token === "string", "tokenizer_info", info);
    const prompts = [];
    for (const text of texts) {
      const { tokens } = await call("/tokenize", { prompt: text, add_special_tokens: false });
      check((await call("/detokenize", { tokens })).prompt === text, "detokenize", text);
      prompts.push(tokens.length > 1 ? tokens : [...tokens, ...tokens, ...tokens]);
    }
    const name = (await call("/v1/models")).data[0].id;
    const ask = async (prompt) => (await call("/v1/completions",
      { model: name, prompt, temperature: 0, max_tokens: 1, logprobs: 1, seed: 1234, echo: true })).choices;
    const choices = [];
    if (mode.together) {
      for (const choice of await ask(prompts)) choices[choice.index] = choice;
    } else {
      for (const ids of prompts) choices.push((await ask([ids]))[0]);
    }
    const flags = [...mode.flags, ...deterministic], key = flags.join(" ");
    expected[key] ??= prompts.map((ids) => expectedLogprobs(ids, flags));
    worst[mode.name] = 0;
    for (const [i, ids] of prompts.entries())
      worst[mode.name] = Math.max(worst[mode.name], compare(ids, choices[i], expected[key][i], mode));
    await call("/v1/completions", { model: name, prompt: texts[1], max_tokens: 1 });
    const until = await call("/v1/completions",
      { model: name, prompt: texts[0], max_tokens: 32, temperature: 0, stop: ["\n\n"], seed: 1234 });
    check(typeof until.choices[0].text === "string" && !until.choices[0].text.includes("\n\n"), "generate_until", until);
    check(server.log().includes("Ein kurzer") === mode.serve.includes("--log-prompts"), "prompts are in the log only when asked for", mode.name);
    check((await server.stop()).code === 0, "exit code");
  }
  const figures = Object.entries(worst).map(([name, value]) => `${value.toExponential(1)} (${name})`).join(", ");
  console.log(`lm_eval_contract: ${checksPassed()} checks passed, log-likelihoods differ by at most ${figures}`);
} catch (error) {
  console.error(error, "\n", server?.log());
  process.exitCode = 1;
  server?.child.kill("SIGKILL");
} finally {
  rmSync(folder, { recursive: true });
}
