// Calls to the gateway: JSON, and server-sent events. It knows HTTP, not the page.

export class ApiError extends Error {
  constructor(message, param, status) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function errorOf(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // Not a response of the gateway, for example a proxy's page.
  }
  const message = error?.message ?? `the server answered with status ${response.status}`;
  return new ApiError(message, error?.param ?? null, response.status);
}

export async function getJson(path, key) {
  const response = await send(path, { headers: headers(key) });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached", null, 0);
  }
}

// The chunks of a stream, as they arrive.
export async function* stream(path, body, key, signal) {
  const response = await send(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  if (!response.ok) throw await errorOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("the stream broke off before its end", null, 0);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.param, 200);
      yield chunk;
    }
  }
}
