// The server's API: one function a call. Errors are `Problem`s with the server's own words.

export class Problem extends Error {
  constructor(status, type, message, wait = 0) {
    super(message);
    this.status = status;
    this.type = type;
    this.wait = wait;
  }
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "offline", "The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  let said = {};
  try {
    said = (await answer.json()).error ?? {};
  } catch {
    // Something between us and the server has answered.
  }
  const wait = Number(answer.headers.get("retry-after")) || 0;
  throw new Problem(answer.status, said.type || "unknown", said.message || `The server answered ${answer.status}.`, wait);
}

const json = async (path, options) => (await ask(path, options)).json();
const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

/** Keep the token of the address in a cookie, and take it out of the address. */
export async function enter(token) {
  await ask("/v1/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
}

export const index = () => json("/v1/index");
export const sample = (count, seed) => json(`/v1/images?count=${count}&seed=${seed}`);
export const about = (id) => json(`/v1/images/${id}/about`);
export const thumbnail = (id, side, version) => `/v1/images/${id}/thumbnail?side=${side}&v=${version.slice(0, 12)}`;
export const original = (id) => `/v1/images/${id}`;

/** A picture of a file that this browser cannot show. */
export async function preview(file) {
  return (await ask("/v1/preview", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } })).blob();
}

/**
 * Search with a file or with the id of a stored photo. A busy server is asked again a few times.
 * @param settings as the API names them; what is null is left out
 */
export async function search({ file, id }, settings, { signal, waiting }) {
  const given = Object.entries(settings).filter(([, value]) => value !== null && value !== "" && value !== false);
  let path = "/v1/search";
  let options;
  if (file) {
    const query = new URLSearchParams();
    for (const [name, value] of given) {
      if (name === "splits") value.forEach((split) => query.append("splits", split));
      else query.append(name, String(value));
    }
    path += `?${query}`;
    options = { body: file, headers: { "Content-Type": "application/octet-stream" } };
  } else {
    options = { body: JSON.stringify({ id, ...Object.fromEntries(given) }), headers: { "Content-Type": "application/json" } };
  }
  for (let left = 4; ; left -= 1) {
    try {
      return await json(path, { method: "POST", signal, ...options });
    } catch (problem) {
      if (problem.status !== 429 || left === 0) throw problem;
      waiting();
      await pause(1000 * (problem.wait || 1), signal);
    }
  }
}
