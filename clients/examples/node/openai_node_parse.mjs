// The OpenAI SDK for Node with a Seraph server: an answer as an object, which the server keeps to by a JSON schema.
//
// SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... node clients/examples/node/openai_node_parse.mjs

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({
  baseURL: `${process.env.SERAPH_BASE_URL ?? "http://127.0.0.1:8000"}/v1`,
  apiKey: process.env.SERAPH_API_KEY ?? "none",
});

const Verdict = z.object({ claim: z.enum(["true", "false", "unknown"]), certain: z.boolean() });

const answer = await client.chat.completions.parse({
  model: (await client.models.list()).data[0].id,
  messages: [{ role: "user", content: "Paris is the capital of France." }],
  response_format: zodResponseFormat(Verdict, "verdict"),
  temperature: 0,
  max_tokens: 400,
});
console.log(JSON.stringify(answer.choices[0].message.parsed));
