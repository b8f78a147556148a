// OpenAI's own client against the real program.
// Usage: node openai_client.mjs PROGRAM MODEL
import { spawnSync } from "node:child_process";
import OpenAI from "openai";
import { check, checksPassed, startServer } from "./start_server.mjs";

const [program, model] = process.argv.slice(2);
const server = await startServer(program, ["-m", model, "-c", "8192", "-t", "2", "--max-running", "2", "--max-waiting", "2",
  "--served-model-name", "demo", "--api-key", "secret", "--deterministic"]);
const client = new OpenAI({ baseURL: server.url + "/v1", apiKey: "secret" });
const base = { model: "demo", temperature: 0, seed: 1 };
const messages = [{ role: "user", content: "The lightning indexer" }];
const thrown = async (promise) => { try { await promise; } catch (error) { return error; } return null; };
const metrics = async () => {
  const text = await (await fetch(server.url + "/metrics", { headers: { Authorization: "Bearer secret" } })).text();
  return (name) => Number(new RegExp(`^${name}\\{[^}]*\\} (\\S+)$`, "m").exec(text)[1]);
};
const idle = async () => {
  for (let i = 0; i < 200; ++i) {
    if ((await metrics())("vllm:num_requests_running") === 0) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  check(false, "requests are still running");
};

// vLLM's names have a colon, of which promtool may complain; of nothing else.
const promtoolIsHappy = async () => {
  const text = await (await fetch(server.url + "/metrics", { headers: { Authorization: "Bearer secret" } })).text();
  const promtool = spawnSync("promtool", ["check", "metrics"], { input: text, encoding: "utf8" });
  if (promtool.error?.code === "ENOENT") return console.log("promtool is not installed: its check is skipped");
  const complaints = (promtool.stdout + promtool.stderr).split("\n").filter((line) => line && !line.includes("metric names should not contain ':'"));
  check(complaints.length === 0, "promtool check metrics", complaints);
};

try {
  const models = await client.models.list();
  check(models.data[0].id === "demo" && models.data[0].object === "model", "models", models);

  const whole = await client.chat.completions.create({ ...base, messages, max_completion_tokens: 24, logprobs: true, top_logprobs: 3 });
  check(whole.object === "chat.completion" && whole._request_id, "chat", whole);
  check(whole.usage.completion_tokens <= 24 && whole.usage.total_tokens === whole.usage.prompt_tokens + whole.usage.completion_tokens, "usage", whole.usage);
  for (const item of whole.choices[0].logprobs.content) {
    check(item.top_logprobs.length === 3 && item.logprob <= 0, "logprobs", item);
    check(item.top_logprobs[0].logprob === item.logprob, "a greedy token is the likeliest", item);
    check(Buffer.from(item.bytes).length > 0, "bytes", item);
  }

  let text = "", usage = null, reason = null;
  for await (const chunk of await client.chat.completions.create({ ...base, messages, max_completion_tokens: 24, stream: true, stream_options: { include_usage: true } })) {
    for (const choice of chunk.choices) { text += choice.delta.content ?? ""; reason ??= choice.finish_reason; }
    if (chunk.usage) usage = chunk.usage;
  }
  check(text === whole.choices[0].message.content, "a stream says the same", text, whole.choices[0].message.content);
  check(reason === whole.choices[0].finish_reason && usage.completion_tokens === whole.usage.completion_tokens, "the end of a stream", reason, usage);
  const final = await client.chat.completions.stream({ ...base, messages, max_completion_tokens: 24 }).finalChatCompletion();
  check(final.choices[0].message.content === text, "the stream helper says the same");

  const stopAt = text.slice(6, 10);
  const stopped = await client.chat.completions.create({ ...base, messages, max_completion_tokens: 24, stop: [stopAt] });
  check(stopped.choices[0].message.content === text.slice(0, text.indexOf(stopAt)) && stopped.choices[0].finish_reason === "stop", "stop", stopped);

  const several = await client.completions.create({ model: "demo", prompt: ["The index", "A layer"], n: 2, max_tokens: 8, temperature: 1, seed: 5 });
  check(several.choices.length === 4 && several.choices.every((choice, i) => choice.index === i), "n and prompts", several);
  const again = await client.completions.create({ model: "demo", prompt: ["The index", "A layer"], n: 2, max_tokens: 8, temperature: 1, seed: 5 });
  check(JSON.stringify(several.choices) === JSON.stringify(again.choices), "a seed gives the same again");

  const aborted = new AbortController();
  let seen = 0;
  const error = await thrown((async () => {
    for await (const chunk of await client.chat.completions.create({ ...base, messages, max_completion_tokens: 8000, ignore_eos: true, stream: true }, { signal: aborted.signal }))
      if (chunk.choices[0]?.delta.content && ++seen === 3) aborted.abort();
  })());
  check(seen >= 3 && (error === null || error instanceof OpenAI.APIUserAbortError), "abort", seen, error);
  await idle();
  check((await metrics())("indexcache_requests_cancelled_total") >= 1, "the abort was noticed");
  for await (const chunk of await client.completions.create({ ...base, prompt: "The", max_tokens: 8000, ignore_eos: true, stream: true })) if (chunk.choices[0].text) break;
  await idle();

  const errors = [
    [{ model: "other", messages }, OpenAI.NotFoundError, "model_not_found"],
    [{ ...base, messages, temperature: 3 }, OpenAI.BadRequestError, null, "temperature"],
    [{ ...base, messages, response_format: { type: "json_object" } }, OpenAI.BadRequestError, null, "response_format"],
    [{ ...base, messages: [{ role: "user", content: "x ".repeat(20000) }] }, OpenAI.BadRequestError, "context_length_exceeded", "messages"],
  ];
  for (const [request, type, code, param] of errors) {
    const wrong = await thrown(client.chat.completions.create(request));
    check(wrong instanceof type && wrong.message && (!code || wrong.code === code) && (!param || wrong.param === param), "error", request.model, wrong);
  }
  const stranger = new OpenAI({ baseURL: server.url + "/v1", apiKey: "wrong", maxRetries: 0 });
  check(await thrown(stranger.models.list()) instanceof OpenAI.AuthenticationError, "a wrong key");

  // 2 may run and 2 wait: the fifth is refused at first, and the client tries again.
  const hold = new AbortController();
  const long = () => client.completions.create({ ...base, prompt: "The", max_tokens: 8000, ignore_eos: true }, { signal: hold.signal, maxRetries: 0 }).catch((e) => e);
  const held = [long(), long(), long(), long()];
  const inWork = async () => { const value = await metrics(); return value("vllm:num_requests_running") + value("vllm:num_requests_waiting"); };
  for (let i = 0; i < 200 && (await inWork()) < 4; ++i) await new Promise((resolve) => setTimeout(resolve, 20));
  check((await inWork()) === 4, "four requests are in work");
  await promtoolIsHappy();
  const impatient = await thrown(client.completions.create({ ...base, prompt: "The", max_tokens: 2 }, { maxRetries: 0 }));
  check(impatient instanceof OpenAI.RateLimitError && impatient.headers.get("retry-after"), "429", impatient);
  const patient = client.completions.create({ ...base, prompt: "The", max_tokens: 2 }, { maxRetries: 8 });
  await new Promise((resolve) => setTimeout(resolve, 300));
  hold.abort();
  await Promise.all(held);
  check((await patient).choices[0].text.length > 0, "a retry after 429 succeeds");

  // After all that, the same answer.
  const last = await client.chat.completions.create({ ...base, messages, max_completion_tokens: 24, logprobs: true, top_logprobs: 3 });
  check(JSON.stringify(last.choices) === JSON.stringify(whole.choices), "a known-good request gives the same bytes", last.choices[0].message, whole.choices[0].message);

  // SIGTERM: what runs ends well, what comes is refused, the exit code is 0.
  const running = await client.completions.create({ ...base, prompt: "The", max_tokens: 60, stream: true, ignore_eos: true });
  let pieces = 0, end = null;
  const reading = (async () => { for await (const chunk of running) { ++pieces; end = chunk.choices[0]?.finish_reason ?? end; } })();
  server.child.kill("SIGTERM");
  await new Promise((resolve) => setTimeout(resolve, 100));
  const late = await thrown(client.completions.create({ ...base, prompt: "The", max_tokens: 2 }, { maxRetries: 0 }));
  check(late instanceof OpenAI.APIError, "a request while draining", late);
  await reading;
  check(end === "length" && pieces > 1, "a stream ends well while draining", end, pieces);
  const { code } = await server.exited;
  check(code === 0, "exit code", code);
  check(!server.log().includes("lightning"), "prompts are not in the log");
  console.log(`openai_client: ${checksPassed()} checks passed`);
} catch (error) {
  console.error(error, "\n", server.log());
  process.exitCode = 1;
  server.child.kill("SIGKILL");
}
