// What is searched with, when a search begins, and what is shown of it.

import * as api from "./api.js";
import { Lightbox } from "./lightbox.js";
import * as link from "./link.js";
import { bringing, PhotoStage } from "./photo.js";
import * as results from "./results.js";
import { milliseconds, SettingsForm } from "./settings.js";

const at = (id) => document.getElementById(id);
const SAMPLES = 24;
const TITLES = {
  offline: "No connection", busy: "The server is busy", timeout: "That took too long", too_large: "The photo is too large",
  image_too_large: "The photo is too large", image_not_an_image: "That is not a photo", image_corrupt: "The photo is damaged",
  image_unsupported: "The format is not read here", image_empty: "The file is empty", not_found: "It is not there (any more)",
  slow: "The connection is too slow", unavailable: "Something cannot be read", corrupt: "A file is damaged",
};

let info = null; // of the index
let query = null; // { file, address } of one's own photo, { id, address, hit } of a stored one
let answer = null;
let running = null; // AbortController of the search under way
let timer = 0;
let seed = 0;
let key = Date.now(); // of the entries of the history; those from before a reload have others
const files = new Map(); // own photos by key, so that "back" finds them

const stage = new PhotoStage((box, wait = 0) => {
  boxed();
  soon(wait);
});
const settings = new SettingsForm((wait) => soon(wait));
const lightbox = new Lightbox((hit) => begin({ id: hit.id, hit }));

// ---------------------------------------------------------------- a search

/** Search with another photo: a new entry of the history. */
function begin(next, box = null) {
  key += 1;
  if (next.file) {
    files.set(key, next.file);
    if (files.size > 10) files.delete(files.keys().next().value);
  }
  take(next, box);
  history.pushState({ key }, "", address());
  window.scrollTo({ top: 0 });
  return run();
}

/** Let go of the photo of before. */
function leave() {
  if (query?.file) URL.revokeObjectURL(query.address);
  query = null;
}

/** Show the photo that is searched with. */
function take(next, box) {
  leave();
  query = next;
  document.body.dataset.state = "asked";
  answer = null;
  at("invite").hidden = true;
  at("tools").hidden = at("box-help").hidden = at("how").hidden = false;
  if (query.file) {
    query.address = URL.createObjectURL(query.file);
    stage.show(query.address, () => unshown(query));
  } else {
    query.address = api.thumbnail(query.id, 1280, info?.fingerprint || "");
    stage.show(query.address, () => (stage.stage.hidden = true));
  }
  at("part").disabled = !query.file && !info?.encoder;
  stage.set(at("part").disabled ? null : box);
  boxed();
}

/** A browser that cannot show a format gets a picture of it from the server, which can. */
async function unshown(of) {
  stage.image.onerror = null;
  try {
    const picture = await api.preview(of.file);
    if (query !== of) return;
    URL.revokeObjectURL(of.address);
    of.reduced = true; // its pixels are not those of the photo
    of.address = URL.createObjectURL(picture);
    stage.show(of.address, null);
  } catch {
    if (query === of) stage.stage.hidden = true; // the search itself says what is wrong
  }
}

function boxed() {
  at("whole").hidden = !stage.box;
  at("part").hidden = Boolean(stage.box);
}

/** Search again with what has changed, once it is done changing. */
function soon(wait) {
  clearTimeout(timer);
  timer = setTimeout(() => {
    history.replaceState(history.state, "", address());
    if (query) run();
  }, wait);
}

const address = () => link.write({ id: query?.id ?? null, box: stage.box, settings: settings.value });

/** In px of the upright photo, which the server counts in. */
function pixels(box) {
  const size = query.hit?.width ? [query.hit.width, query.hit.height] : query.size || (query.reduced ? null : stage.size);
  return box && size ? box.map((side, number) => Math.round(side * size[number % 2] * 10) / 10) : null;
}

async function run() {
  clearTimeout(timer);
  running?.abort();
  const mine = (running = new AbortController());
  const asked = query;
  trouble(null);
  results.busy(true);
  at("others").hidden = at("nothing").hidden = true;
  at("found-title").textContent = "Searching …";
  at("summary").textContent = "";
  if (!answer) results.bones();
  try {
    if (asked.id !== undefined && !asked.hit) asked.hit = await api.about(asked.id);
    if (asked.file && stage.box && !pixels(stage.box)) await stage.image.decode().catch(() => {});
    const start = performance.now();
    const box = pixels(stage.box);
    const waiting = () => (at("summary").textContent = "The server is busy, trying again …");
    const found = await api.search(asked, { ...settings.request, box: box && (asked.file ? box.join(",") : box) }, { signal: mine.signal, waiting });
    if (mine.signal.aborted) return;
    answer = found;
    if (asked.file && found.query.width) asked.size = [found.query.width, found.query.height];
    if (stage.box && !box && asked.size) return await run(); // only now is it known how many px that is
    shown(performance.now() - start);
    if (info && found.index !== info.fingerprint) learn().catch(() => {}); // the results are there; the next search asks again
  } catch (problem) {
    if (problem.name === "AbortError" || mine.signal.aborted) return;
    failed(problem);
  } finally {
    if (running === mine) results.busy(false);
  }
}

function shown(ms) {
  const { hits, used } = answer;
  at("found-title").textContent = hits.length ? "Found" : "Nothing found";
  const where = used.exact ? "compared with" : "among";
  const count = hits.length === 1 ? "1 photo" : `${hits.length.toLocaleString("en")} photos`;
  at("summary").textContent = `${count} ${where} ${used.rows.toLocaleString("en")}, in ${milliseconds(ms)}`;
  results.show(hits, answer.index, { picked: compare, own: query.id ?? null });
  results.time(answer, ms);
  at("share").hidden = false;
  at("share").disabled = query.id === undefined;
  at("share").title = query.id === undefined ? "A photo of your own has no link: search with one of the results to share it" : "";
  document.title = query.hit ? `${query.hit.name} – search by photo` : "Search by photo";
}

function compare(number) {
  const picture = stage.stage.hidden ? null : { address: query.address, box: stage.box };
  lightbox.open(answer.hits, number, answer.index, picture, (last) => at("hits").children[last]?.firstElementChild.focus());
}

// ---------------------------------------------------------------- the page

function trouble(problem) {
  at("trouble").replaceChildren();
  if (!problem) return;
  const title = Object.assign(document.createElement("strong"), { textContent: TITLES[problem.type] || "That did not work" });
  const text = Object.assign(document.createElement("p"), { textContent: problem.message });
  const again = Object.assign(document.createElement("button"), { type: "button", textContent: "Try again" });
  again.addEventListener("click", () => (query ? run() : start()));
  at("trouble").append(title, text, again);
}

function failed(problem) {
  if (problem.status === 401) {
    ask();
    return;
  }
  answer = null;
  at("hits").replaceChildren();
  at("time").hidden = true;
  at("found-title").textContent = "No results";
  at("summary").textContent = "";
  trouble(problem);
}

/** Ask for the token. */
function ask() {
  if (at("door").open) return;
  at("door").showModal();
  at("door").addEventListener("cancel", (event) => event.preventDefault());
  at("door-form").onsubmit = async (event) => {
    event.preventDefault();
    try {
      await api.enter(at("door-token").value);
      at("door").close();
      start();
    } catch (problem) {
      at("door-wrong").textContent = problem.status === 401 ? "That is not the token." : problem.message;
    }
  };
}

async function learn() {
  info = await api.index();
  settings.offer(info);
  const parts = [`${info.rows.toLocaleString("en")} photos`, `${info.dim} dimensions`, info.factory];
  if (info.encoder) parts.push(info.encoder);
  at("about").textContent = parts.join(" · ");
  at("version").textContent = `· index ${info.fingerprint.slice(0, 12)}`;
  if (!info.encoder) {
    at("invite").replaceChildren(
      Object.assign(document.createElement("p"), {
        className: "quiet",
        textContent: "This server has no encoder, so photos of your own cannot be searched with. Begin with one of its own.",
      }),
    );
    at("another").hidden = at("part").hidden = true;
  }
}

async function begins() {
  document.body.dataset.state = "empty";
  leave();
  answer = null;
  running?.abort();
  results.busy(false);
  trouble(null);
  stage.stage.hidden = true;
  at("invite").hidden = false;
  at("tools").hidden = at("box-help").hidden = at("how").hidden = at("time").hidden = at("share").hidden = true;
  at("found-title").textContent = "Or begin with one of these";
  at("summary").textContent = "";
  document.title = "Search by photo";
  results.bones();
  const mine = seed;
  const hits = await api.sample(SAMPLES, mine);
  if (query || mine !== seed) return;
  at("others").hidden = hits.length < SAMPLES;
  results.show(hits, info.fingerprint, { scored: false, picked: (number) => begin({ id: hits[number].id, hit: hits[number] }) });
}

/** Show what the address says. */
async function arrive(state) {
  const { id, box, settings: wanted } = link.read(location.search);
  settings.value = { ...wanted, k: wanted.k || 50 };
  const file = files.get(state?.key);
  if (file) take({ file }, null);
  else if (id !== null) take({ id }, box);
  else return begins();
  return run();
}

async function start() {
  try {
    const token = new URLSearchParams(location.hash.slice(1)).get("token");
    if (token) {
      history.replaceState(history.state, "", location.pathname + location.search);
      await api.enter(token);
    }
    trouble(null);
    await learn();
    await arrive(history.state);
  } catch (problem) {
    failed(problem);
  }
}

const THEMES = { "": "as the system", light: "light", dark: "dark" };
function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  at("theme").setAttribute("aria-label", `Colours: ${THEMES[name]}`);
  at("theme").title = `Colours: ${THEMES[name]}`;
}
theme(localStorage.getItem("theme") in THEMES ? localStorage.getItem("theme") : "");
at("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme || "") + 1) % names.length];
  localStorage.setItem("theme", next);
  theme(next);
});

bringing((file) => {
  if (!info?.encoder) return;
  if (lightbox.dialog.open) lightbox.dialog.close();
  if (file.size > info.limits.upload_bytes) {
    const most = (info.limits.upload_bytes / 2 ** 20).toLocaleString("en");
    trouble(new api.Problem(413, "too_large", `It has ${(file.size / 2 ** 20).toFixed(1)} MB, the server takes ${most} MB.`));
    return;
  }
  begin({ file });
});
at("part").addEventListener("click", () => stage.middle());
at("whole").addEventListener("click", () => stage.clear());
at("others").addEventListener("click", () => {
  seed += 1;
  begins().catch(failed);
});
at("home").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.pushState({}, "", "/");
  arrive({}).catch(failed);
});
at("share").addEventListener("click", async () => {
  const said = at("share").querySelector("span");
  try {
    await navigator.clipboard.writeText(location.origin + address());
    said.textContent = "Copied";
  } catch {
    said.textContent = "See the address";
  }
  setTimeout(() => (said.textContent = "Copy link"), 1800);
});
window.addEventListener("popstate", (event) => {
  if (lightbox.dialog.open) lightbox.dialog.close();
  arrive(event.state).catch(failed);
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, select, textarea, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "o" && info?.encoder) at("file").click();
  else if (event.key === "b" && query && !at("part").disabled) stage.box ? stage.handle.focus() : stage.middle();
  else return;
  event.preventDefault();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // an address with a fragment would be an entry of the history
  at("found").focus();
});
at("how").open = matchMedia("(min-width: 60.01rem)").matches;
results.arrows();
start();
