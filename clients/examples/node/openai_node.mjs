// The OpenAI SDK for Node with a Seraph server: one answer, the same one streamed in three ways, and vectors.
//
// SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... node clients/examples/node/openai_node.mjs

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.env.SERAPH_BASE_URL ?? "http://127.0.0.1:8000"}/v1`,
  apiKey: process.env.SERAPH_API_KEY ?? "none",
});

const served = (await client.models.list()).data;
const modelOf = (kind) => served.find((model) => model.kind === kind)?.id;
const question = {
  model: modelOf("generate"),
  messages: [{ role: "user", content: "Tell me the capital of France." }],
  temperature: 0,
  max_tokens: 20,
};

const { data: answer, request_id } = await client.chat.completions.create(question).withResponse();
console.log("whole:", JSON.stringify(answer.choices[0].message.content));
console.log("request id:", request_id);

let text = "";
let usage;
const chunks = await client.chat.completions.create({
  ...question,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of chunks) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage ??= chunk.usage;
}
console.log("streamed:", JSON.stringify(text));
console.log("tokens:", usage.completion_tokens);

let pieces = "";
const helper = client.chat.completions.stream(question).on("content", (piece) => (pieces += piece));
const last = await helper.finalContent();
console.log("by events:", JSON.stringify(pieces));
console.log("final:", JSON.stringify(last));

// Leaving the loop closes the connection, and the server stops writing.
for await (const chunk of await client.chat.completions.create({ ...question, max_tokens: 4000, stream: true })) {
  console.log("stopped after:", chunk.object);
  break;
}

try {
  await client.chat.completions.create({ ...question, temperature: 7 });
} catch (error) {
  if (!(error instanceof OpenAI.BadRequestError)) throw error;
  console.log("refused:", error.status, error.param);
}

const embedder = modelOf("embed");
if (embedder === undefined) {
  console.log("no embedding model is served: start one with --embedding-model");
} else {
  const vectors = await client.embeddings.create({ model: embedder, input: ["water", "bread"] });
  console.log("vectors:", JSON.stringify(vectors.data.map((each) => each.embedding.length)));
}
