// A gRPC client in another language that knows nothing but proto/: it loads the contract at run time.
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [edge, model, question, proto, googleapis] = process.argv.slice(2);
const definition = loader.loadSync("helios/api/inference/v1/inference_service.proto", {
  includeDirs: [proto, googleapis],
  enums: String,
  longs: Number,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).helios.api.inference.v1;
const client = new InferenceService(edge, grpc.credentials.createInsecure());

function chat(name) {
  const metadata = new grpc.Metadata();
  metadata.set("x-helios-model", name);
  const request = {
    model: name,
    messages: [{ role: "ROLE_USER", content: question }],
    sampling: { temperature: 0, maxTokens: 16 },
  };
  return client.Chat(request, metadata, { deadline: Date.now() + 120_000 });
}

const result = { text: "", finished: 0, tokenIds: 0, completionTokens: 0 };
for await (const event of chat(model)) {
  if (event.delta) {
    result.text += event.delta.text ?? "";
    result.tokenIds += event.delta.tokenIds?.length ?? 0;
  } else {
    result.finished += 1;
    result.completionTokens = event.finished.usage.completionTokens;
  }
}
try {
  for await (const _ of chat("no-such-model"));
} catch (error) {
  const body = JSON.parse(error.metadata.get("x-openai-error")[0] ?? "{}");
  result.missing = { code: error.code, reason: body.error?.code?.toUpperCase() };
}
client.close();
console.log(JSON.stringify(result));
