// One result beside the query.

import * as api from "./api.js";

const at = (id) => document.getElementById(id);

export class Lightbox {
  /** @param searching called with a hit to search with */
  constructor(searching) {
    this.dialog = at("lightbox");
    this.searching = searching;
    at("light-close").addEventListener("click", () => this.dialog.close());
    at("light-previous").addEventListener("click", () => this.#go(-1));
    at("light-next").addEventListener("click", () => this.#go(1));
    at("light-search").addEventListener("click", () => this.#search());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("close", () => this.closed?.(this.number));
    this.dialog.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return; // "back" of the browser is one of these
      if (event.key === "ArrowLeft") this.#go(-1);
      else if (event.key === "ArrowRight") this.#go(1);
      else if (event.key.toLowerCase() === "s") this.#search();
      else return;
      event.preventDefault();
    });
    this.mark = this.dialog.querySelector(".mark");
    this.query = at("light-query").querySelector("img");
    new ResizeObserver(() => this.#place()).observe(this.query);
    this.query.addEventListener("load", () => this.#place());
  }

  /** @param query address and box of the query's picture; null where there is none */
  open(hits, number, version, query, closed) {
    Object.assign(this, { hits, version, box: query?.box, closed });
    at("light-query").hidden = !query;
    if (query) this.query.src = query.address;
    this.query.alt = "The query";
    this.#show(number);
    if (!this.dialog.open) this.dialog.showModal();
    this.#place();
    at("light-next").focus();
  }

  #show(number) {
    this.number = number;
    const hit = this.hits[number];
    at("light-rank").textContent = `${number + 1} of ${this.hits.length}`;
    at("light-name").textContent = hit.name;
    const picture = at("light-match").querySelector("img");
    picture.hidden = !hit.width;
    if (hit.width) picture.src = api.thumbnail(hit.id, 1280, this.version);
    picture.alt = hit.name;
    const details = [`score ${hit.score.toFixed(4)}`, hit.split, hit.width && `${hit.width} × ${hit.height} px`, `id ${hit.id}`];
    at("light-match").querySelector("figcaption").textContent = details.filter(Boolean).join(" · ");
    at("light-original").href = api.original(hit.id);
    at("light-original").hidden = !hit.width;
    at("light-previous").disabled = number === 0;
    at("light-next").disabled = number === this.hits.length - 1;
  }

  #go(step) {
    const number = this.number + step;
    if (number < 0 || number >= this.hits.length) return;
    this.#show(number);
    if (document.activeElement?.disabled || document.activeElement === document.body) at("light-search").focus();
  }

  #search() {
    const hit = this.hits[this.number];
    this.closed = null;
    this.dialog.close();
    this.searching(hit);
  }

  /** The box lies on the picture and not on the frame around it. */
  #place() {
    this.mark.hidden = !this.box || !this.query.naturalWidth;
    if (this.mark.hidden) return;
    const { clientWidth: width, clientHeight: height } = this.query;
    const scale = Math.min(width / this.query.naturalWidth, height / this.query.naturalHeight);
    const [w, h] = [scale * this.query.naturalWidth, scale * this.query.naturalHeight];
    const [x1, y1, x2, y2] = this.box;
    Object.assign(this.mark.style, {
      left: `${(width - w) / 2 + x1 * w}px`,
      top: `${(height - h) / 2 + y1 * h}px`,
      width: `${(x2 - x1) * w}px`,
      height: `${(y2 - y1) * h}px`,
    });
  }
}
