-- For wrk: completions of prompts of mixed lengths, and what became of them.
local lengths = {8, 32, 128, 512, 1024}
local answered, refused, failed = 0, 0, 0
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function request()
  local ids = {}
  for i = 1, lengths[math.random(#lengths)] do ids[i] = math.random(10, 8000) end
  local body = '{"max_tokens": ' .. math.random(1, 32) .. ', "temperature": 0, "prompt": [' .. table.concat(ids, ",") .. "]}"
  return wrk.format("POST", "/v1/completions", {["Content-Type"] = "application/json"}, body)
end

answered_here, refused_here, failed_here = 0, 0, 0
function response(status)
  if status == 200 then
    answered_here = answered_here + 1
  elseif status == 429 or status == 503 then
    refused_here = refused_here + 1
  else
    failed_here = failed_here + 1
  end
end

function done(summary)
  for _, thread in ipairs(threads) do
    answered = answered + thread:get("answered_here")
    refused = refused + thread:get("refused_here")
    failed = failed + thread:get("failed_here")
  end
  io.write(string.format("wrk: %d answers: %d answered, %d refused, %d failed; %d socket errors\n", summary.requests, answered,
    refused, failed, summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
