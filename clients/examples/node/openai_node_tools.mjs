// The OpenAI SDK for Node with a Seraph server: a tool that the model calls, is told the result of, and answers by.
// runTools runs the call. Once whole, then streamed.
//
// SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... node clients/examples/node/openai_node_tools.mjs

import OpenAI from "openai";
import { zodFunction } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({
  baseURL: `${process.env.SERAPH_BASE_URL ?? "http://127.0.0.1:8000"}/v1`,
  apiKey: process.env.SERAPH_API_KEY ?? "none",
});

const returned = { Paris: "18 degrees, cloudy", Oslo: "3 degrees, snow", Lima: "25 degrees, sunny" };
const weather = zodFunction({
  name: "weather",
  description: "Tell the weather of a city",
  parameters: z.object({ city: z.enum(Object.keys(returned)) }),
  function: ({ city }) => returned[city],
});
const fields = {
  model: (await client.models.list()).data[0].id,
  tools: [weather],
  parallel_tool_calls: false,
  temperature: 0,
  max_tokens: 200,
};
const messages = [{ role: "user", content: "What is the weather in Oslo?" }];

// With tool_choice "auto", runTools goes on until an answer calls nothing. Small models seldom think of calling by
// themselves; a function that they must call ends the run with its result, and the answer is asked for in words.
const forced = { ...fields, messages, tool_choice: { type: "function", function: { name: "weather" } } };
const inWords = (run) => ({ ...fields, messages: run.messages, tool_choice: "none" });

function report(run) {
  run.on("functionToolCall", (call) => console.log("called:", call.name, JSON.stringify(JSON.parse(call.arguments))));
  run.on("functionToolCallResult", (result) => console.log("returned:", result));
  return run;
}

const run = report(client.chat.completions.runTools(forced));
await run.done();
const answer = await client.chat.completions.create(inWords(run));
console.log("whole:", JSON.stringify(answer.choices[0].message.content));

const streaming = report(client.chat.completions.runTools({ ...forced, stream: true }));
let pieces = "";
for await (const chunk of streaming) {
  for (const call of chunk.choices[0]?.delta.tool_calls ?? []) pieces += call.function.arguments ?? "";
}
console.log("by pieces:", JSON.stringify(pieces));
let text = "";
for await (const chunk of await client.chat.completions.create({ ...inWords(streaming), stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
}
console.log("streamed:", JSON.stringify(text));
