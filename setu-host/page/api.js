// Talks to the server: keys, errors as it tells them, and streams of server-sent events.

const KEY = 'setu.key';

export const key = {
  get: () => localStorage.getItem(KEY) ?? '',
  set: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

/** A refusal, in the server's words. */
export class Refusal extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

/** Sends a request; `path` is relative to the page, so that it works behind a prefix as well. */
export async function request(path, { body, signal, accept = 'application/json' } = {}) {
  const headers = { accept };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers['content-type'] = 'application/json';
  let response;
  try {
    const method = body === undefined ? 'GET' : 'POST';
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refusal('The server can’t be reached.');
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw refusal(told?.error, response.status, response.headers.get('retry-after'));
}

/** The error that a body holds. */
export function refusal(error, status = 0, retryAfter = null) {
  const message = error?.message ?? `The server answered ${status}.`;
  return new Refusal(message, { status, param: error?.param ?? null, retryAfter });
}

/** The events of a response's body, each as the value that its data holds. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith('data:')).map((line) => line.slice(5).trimStart());
        if (data.length === 0) continue;
        if (data[0] === '[DONE]') return;
        yield JSON.parse(data.join('\n'));
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
