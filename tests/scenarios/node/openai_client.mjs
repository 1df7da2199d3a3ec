// The official openai client against a mesh: unary, streaming, and an error.
import OpenAI from "openai";

const [edge, model, question] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `http://${edge}/v1`, apiKey: "none", maxRetries: 0 });
const request = { model, messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 16 };

const unary = await client.chat.completions.create(request);
let streamed = "";
let pieces = 0;
for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  pieces += 1;
}
let missing = null;
try {
  await client.chat.completions.create({ ...request, model: "no-such-model" });
} catch (error) {
  missing = { status: error.status, code: error.code };
}
console.log(JSON.stringify({ unary: unary.choices[0].message.content, streamed, pieces, missing }));
