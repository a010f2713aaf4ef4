// Requests to the server that this page comes from, with the key that stood behind # in its address.

const key = takeKey();

function takeKey() {
  if (location.hash.length > 1) {
    sessionStorage.setItem("key", location.hash.slice(1));
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("key");
}

export class Refused extends Error {}

export async function request(method, path, body, signal) {
  if (!key) throw new Refused("Open the whole address that align chat has printed: the key in it is missing.");
  let answer;
  try {
    answer = await fetch(path, { method, body, signal, headers: { authorization: `Bearer ${key}` } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is align chat still running?");
  }
  if (!answer.ok) throw new Refused(await reason(answer));
  return answer;
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answers with status ${answer.status}.`;
  }
}

export async function json(method, path, value) {
  const answer = await request(method, path, value === undefined ? undefined : JSON.stringify(value));
  return answer.json();
}

// The events of an answer as they come: {text}, {finish, tokens} or {error}.
export async function* events(path, signal) {
  const answer = await request("POST", path, undefined, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (unread + value).split("\n\n");
    unread = lines.pop();
    for (const line of lines) yield JSON.parse(line.slice("data: ".length));
  }
}
