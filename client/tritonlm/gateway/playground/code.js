// Writes a request as code for curl, Python and JavaScript.

// Arguments of OpenAI's Python library; other parameters are sent in extra_body.
const OPENAI_ARGUMENTS = new Set([
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
  const known = Object.entries(body).filter(([name]) => OPENAI_ARGUMENTS.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI_ARGUMENTS.has(name)));
  const lines = known.map(([name, value]) => `    ${name}=${pythonLiteral(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${pythonLiteral(extra)},`);
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

function pythonLiteral(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${pythonLiteral(each)}`).join(", ")}}`;
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
