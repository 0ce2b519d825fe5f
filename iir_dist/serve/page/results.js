// The list of results as a justified grid, and where the time went.

import * as api from "./api.js";
import { milliseconds } from "./settings.js";

const at = (id) => document.getElementById(id);
const BONES = [1.5, 0.75, 1.33, 1.5, 1, 0.66, 1.5, 1.33, 0.75, 1.5, 1.2, 1, 1.5, 0.75, 1.33, 1.6];

const element = (kind, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
};

const score = (hit) => element("span", { className: "score", textContent: hit.score.toFixed(3) });

/** Show hits. `picked` is called with the number of one that is chosen; `own` is the id that was searched with. */
export function show(hits, version, { picked, own = null, scored = true }) {
  const top = scored ? Math.max(...hits.map((hit) => hit.score), 1e-9) : 1;
  const low = scored ? Math.min(...hits.map((hit) => hit.score), 0) : 0;
  at("hits").replaceChildren(
    ...hits.map((hit, number) => {
      const ratio = hit.width ? Math.min(Math.max(hit.width / hit.height, 0.5), 2.6) : 1;
      const picture = element("span", { className: "picture" });
      if (hit.width) {
        picture.append(
          element("img", { src: api.thumbnail(hit.id, 320, version), alt: "", loading: number < 24 ? "eager" : "lazy", decoding: "async" }),
        );
      } else {
        picture.append(element("span", { textContent: hit.name }));
      }
      const button = element("button", { type: "button", className: hit.width ? "hit" : "hit bare" }, picture);
      if (scored) {
        const bar = element("span", { className: "bar-score" });
        bar.style.width = `${Math.max(2, (100 * (hit.score - low)) / (top - low))}%`;
        picture.append(element("span", { className: "rank", textContent: hit.rank + 1 }), bar);
      }
      if (hit.id === own) {
        picture.append(element("span", { className: "itself", textContent: "query" }));
      }
      button.append(
        element(
          "span",
          { className: "caption" },
          element("span", { className: "name", title: hit.name }, element("bdi", { textContent: hit.name })),
          ...(scored ? [element("span", { className: "unseen", textContent: "score" }), score(hit)] : []),
        ),
      );
      button.addEventListener("click", () => picked(number));
      const item = element("li", {}, button);
      item.style.setProperty("--ratio", ratio);
      return item;
    }),
  );
}

/** Grey shapes in place of what is not there yet. */
export function bones() {
  at("hits").replaceChildren(
    ...BONES.map((ratio) => {
      const item = element("li", {}, element("div", { className: "bone" }));
      item.setAttribute("aria-hidden", "true");
      item.style.setProperty("--ratio", ratio);
      return item;
    }),
  );
}

export const busy = (state) => {
  at("hits").setAttribute("aria-busy", state);
  at("progress").hidden = !state;
};

/** Arrow keys go from result to result. */
export function arrows() {
  at("hits").addEventListener("keydown", (event) => {
    const buttons = [...at("hits").querySelectorAll("button")];
    const here = buttons.indexOf(document.activeElement);
    if (here < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    let next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (event.key === "ArrowDown" || event.key === "ArrowUp") next = beside(buttons, here, event.key === "ArrowDown");
    if (next === undefined || !buttons[next]) return;
    buttons[next].focus();
    event.preventDefault();
  });
}

/** The one above or below. */
function beside(buttons, here, down) {
  const frames = buttons.map((button) => button.getBoundingClientRect());
  const { top, left, width } = frames[here];
  const middle = left + width / 2;
  const rows = frames.map((frame) => frame.top).filter((y) => (down ? y > top + 5 : y < top - 5));
  if (!rows.length) return undefined;
  const row = down ? Math.min(...rows) : Math.max(...rows);
  const distance = (frame) => Math.abs(frame.left + frame.width / 2 - middle);
  let best;
  frames.forEach((frame, number) => {
    if (Math.abs(frame.top - row) < 5 && (best === undefined || distance(frame) < distance(frames[best]))) best = number;
  });
  return best;
}

/** Where the time went; `seen` are the milliseconds that this page has waited. */
export function time(answer, seen) {
  const steps = { ...answer.steps_ms, network: Math.max(0, seen - answer.total_ms) };
  const all = Object.values(steps).reduce((sum, ms) => sum + ms, 0) || 1;
  at("time-bar").replaceChildren(
    ...Object.entries(steps).map(([step, ms]) => {
      const part = element("span");
      part.dataset.step = step;
      part.style.width = `${(100 * ms) / all}%`;
      return part;
    }),
  );
  at("time-steps").replaceChildren(
    ...Object.entries(steps).map(([step, ms]) => {
      const row = element("div", {}, element("dt", { textContent: step }), element("dd", { textContent: milliseconds(ms) }));
      row.dataset.step = step;
      return row;
    }),
  );
  at("time").hidden = false;
}
