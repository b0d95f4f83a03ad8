// The same tour as programs.py, for clients in JavaScript: node programs.mjs CLIENT BASE_URL MODEL [tools] [away]
import { createInterface } from "node:readline/promises";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const QUESTION = "What is the weather in Paris?";
const PARAMETERS = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };

function openai(url) {
  const client = new OpenAI({ baseURL: url, apiKey: "unused", maxRetries: 0 });
  const ask = (model, more = {}) =>
    client.chat.completions.create({
      model,
      messages: [{ role: "user", content: QUESTION }],
      max_tokens: 8,
      ...more,
    });
  return {
    whole: async (model) => (await ask(model)).choices[0].message.content,
    streamed: async (model) => {
      let text = "";
      for await (const chunk of await ask(model, { stream: true })) text += chunk.choices[0]?.delta.content ?? "";
      return text;
    },
    tool: async (model) => {
      const weather = { name: "weather", description: "Tell the weather.", parameters: PARAMETERS };
      const answer = await ask(model, { tools: [{ type: "function", function: weather }] });
      const call = answer.choices[0].message.tool_calls[0].function;
      return [call.name, JSON.parse(call.arguments)];
    },
    status: (error) => error.status,
  };
}

function ai(url) {
  const provider = createOpenAICompatible({ name: "guarded", baseURL: url, apiKey: "unused" });
  const asked = (model) => ({ model: provider(model), prompt: QUESTION, maxOutputTokens: 8, maxRetries: 0 });
  return {
    whole: async (model) => (await generateText(asked(model))).text,
    streamed: async (model) => {
      let text = "";
      for await (const part of streamText(asked(model)).textStream) text += part;
      return text;
    },
    tool: async (model) => {
      const weather = tool({ description: "Tell the weather.", inputSchema: jsonSchema(PARAMETERS) });
      const [call] = (await generateText({ ...asked(model), tools: { weather } })).toolCalls;
      return [call.toolName, call.input];
    },
    status: (error) => error.statusCode,
  };
}

async function statusOf(client, call) {
  try {
    return `no error: ${await call()}`;
  } catch (error) {
    return client.status(error) ?? String(error);
  }
}

const [name, url, model, ...more] = process.argv.slice(2);
const client = { "openai-npm": openai, "ai-sdk": ai }[name](url);
const seen = {
  whole: await client.whole(model),
  streamed: await client.streamed(model),
  mandatory: await statusOf(client, () => client.whole(`${model}+none`)),
  unknown: await statusOf(client, () => client.whole("gpt-4o")),
};
if (more.includes("tools")) seen.tool = await client.tool(model);
console.log(JSON.stringify(seen));
if (more.includes("away")) {
  const lines = createInterface({ input: process.stdin });
  await lines.question("");
  lines.close();
  console.log(JSON.stringify({ away: await statusOf(client, () => client.whole(model)) }));
}
