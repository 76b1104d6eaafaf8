// The server that sent this page, as the engine of the chat: what it is, and answers as they come.

/** What the page says of the model: {name, facts, trainedLoops, hasAuto, hasKey}. */
export async function describe(key) {
  const { data } = await (await request("v1/models", key)).json();
  const [{ id, melt }] = data;
  const bytes = melt.state_bytes / melt.slots;
  const facts = `${melt.capacity} tokens a conversation, ${shown(bytes)} of memory each, whatever the depth`;
  return { name: id, facts, trainedLoops: melt.trained_loops, hasAuto: true, hasKey: true };
}

/**
 * Answers a chat, piece by piece: {text, loops} with the loops of each new token, and at the end {usage}.
 * @param messages of the chat, each {role, content}
 * @param loops a number, or "auto"
 * @param signal ends it
 */
export async function* answer(messages, loops, key, signal) {
  const body = { messages, loops, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) yield { usage: event.usage };
    for (const choice of event.choices) {
      if (choice.delta?.content || choice.loops?.length) yield { text: choice.delta.content, loops: choice.loops ?? [] };
    }
  }
}

async function request(path, key, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server does not answer: is it running?");
  }
  if (!response.ok) {
    const said = await response.json().catch(() => null);
    throw new Error(said?.error?.message ?? `the server answered with status ${response.status}`);
  }
  return response;
}

/** The objects of a stream of server-sent events; it must end with [DONE]. */
async function* events(stream) {
  const decoder = new TextDecoder();
  let text = "";
  const reader = stream.getReader();
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error("the server went away in the middle of the answer");
    }
    if (part.done) throw new Error("the server went away in the middle of the answer");
    text += decoder.decode(part.value, { stream: true });
    const lines = text.split("\n\n");
    text = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function shown(bytes) {
  const units = ["B", "kB", "MB", "GB"];
  let place = 0;
  while (bytes >= 1000 && place < units.length - 1) [bytes, place] = [bytes / 1000, place + 1];
  return `${bytes.toFixed(place ? 2 : 0)} ${units[place]}`;
}
