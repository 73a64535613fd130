// OpenAI's own client for Node against a running server: BASE_URL MODEL.

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name three fruits." }];
const greedy = { model, messages, temperature: 0, max_completion_tokens: 60 };

const models = await client.models.list();
assert(models.data.some((found) => found.id === model));

const whole = await client.chat.completions.create({ ...greedy, logprobs: true, top_logprobs: 2 });
const text = whole.choices[0].message.content;
assert(text && whole.choices[0].logprobs.content.every((token) => token.top_logprobs.length === 2));

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...greedy, stream: true })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
}
assert.equal(streamed, text);

const city = { type: "object", properties: { city: { type: "string", enum: ["Zürich", "Oslo"] } }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "weather", parameters: city, strict: true } }];
const asked = { ...greedy, tools, tool_choice: "required", parallel_tool_calls: false };
const called = (await client.chat.completions.create(asked)).choices[0];
assert.equal(called.finish_reason, "tool_calls");
assert(["Zürich", "Oslo"].includes(JSON.parse(called.message.tool_calls[0].function.arguments).city));
const final = await client.chat.completions.stream(asked).finalChatCompletion();
assert.deepEqual(final.choices[0].message.tool_calls[0].function.arguments, called.message.tool_calls[0].function.arguments);
const answer = { role: "tool", tool_call_id: called.message.tool_calls[0].id, content: "Rain" };
assert((await client.chat.completions.create({ ...greedy, tools, messages: [...messages, called.message, answer] })).usage);

const format = { type: "json_schema", json_schema: { name: "place", schema: city, strict: true } };
const place = await client.chat.completions.create({ ...greedy, response_format: format });
assert(["Zürich", "Oslo"].includes(JSON.parse(place.choices[0].message.content).city));

await assert.rejects(client.chat.completions.create({ ...greedy, temperature: 1000 }), (error) => {
  return error instanceof OpenAI.BadRequestError && error.param === "temperature";
});
await assert.rejects(client.chat.completions.create({ ...greedy, model: "nobody" }), OpenAI.NotFoundError);
console.log("ok");
