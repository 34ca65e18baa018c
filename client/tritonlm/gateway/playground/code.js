// A request as a program: curl, Python and JavaScript. Knows how they write values.

// What OpenAI's Python library has arguments for; the rest goes into extra_body.
const OPENAIS = new Set([
  "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options",
  "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs",
]);

export function codeOf(language, path, body, hasKey) {
  const base = new URL("v1", document.baseURI).href;
  return { curl, python, javascript }[language](base, path, body, hasKey);
}

function curl(base, path, body, hasKey) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $TRITONLM_API_KEY"` : "";
  return `curl -N ${base}/${path}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d '${json}'`;
}

function python(base, path, body, hasKey) {
  const own = Object.entries(body).filter(([name]) => OPENAIS.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAIS.has(name)));
  const lines = own.map(([name, value]) => `    ${name}=${pythonic(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${pythonic(extra)},`);
  const call = path.replace("/", ".");
  const text = path === "completions" ? "choice.text" : 'choice.delta.content or ""';
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${base}", api_key=${hasKey ? 'os.environ["TRITONLM_API_KEY"]' : '"none"'})`,
    `stream = client.${call}.create(`,
    ...lines,
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    `        print(${text}, end="", flush=True)`,
  ].join("\n");
}

function pythonic(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(pythonic).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${pythonic(each)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

function javascript(base, path, body, hasKey) {
  const call = path.replace("/", ".");
  const text = path === "completions" ? "choice.text" : 'choice.delta.content ?? ""';
  return [
    'import OpenAI from "openai";',
    "",
    `const client = new OpenAI({ baseURL: "${base}", apiKey: ${hasKey ? "process.env.TRITONLM_API_KEY" : '"none"'} });`,
    `const stream = await client.${call}.create(${JSON.stringify(body, null, 2)});`,
    "for await (const chunk of stream) {",
    `  for (const choice of chunk.choices) process.stdout.write(${text});`,
    "}",
  ].join("\n");
}
