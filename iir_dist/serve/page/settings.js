// How to search: the operating point with its recall and latency, exact search, re-ranking, length, filters.

const at = (id) => document.getElementById(id);
const RERANKERS = { qe: "query expansion", dba: "neighbours' mean", diffusion: "diffusion", superglobal: "SuperGlobal" };

export class SettingsForm {
  /** @param changed called with the milliseconds to wait for more of it */
  constructor(changed) {
    this.points = [];
    this.splits = new Set();
    at("settings").addEventListener("submit", (event) => event.preventDefault());
    at("point").addEventListener("input", () => {
      this.#say();
      changed(250);
    });
    at("prefix").addEventListener("input", () => changed(400));
    for (const id of ["exact", "rerank", "k"]) {
      at(id).addEventListener("change", () => {
        this.#say();
        changed(0);
      });
    }
    at("splits").addEventListener("click", (event) => {
      const chip = event.target.closest("button");
      if (!chip) return;
      const { split } = chip.dataset;
      if (!this.splits.delete(split)) this.splits.add(split);
      chip.setAttribute("aria-pressed", this.splits.has(split));
      changed(0);
    });
  }

  /** Offer what the index has. */
  offer(info) {
    const kept = this.value;
    this.info = info;
    this.points = info.points.map((point) => ({ ...point, worst: Math.min(1, ...Object.values(point.recall)) }));
    at("effort").hidden = this.points.length < 2 && !info.exact;
    at("point").hidden = this.points.length < 2;
    document.querySelector(".ends").hidden = at("point").hidden;
    at("point").max = Math.max(0, this.points.length - 1);
    at("exact-line").hidden = !info.exact;
    at("exact-line").lastElementChild.textContent = `Exact: compare with all ${info.rows.toLocaleString("en")}`;
    at("rerank").replaceChildren(
      new Option("no", ""),
      ...info.rerankers.map((name) => new Option(RERANKERS[name] || name, name)),
    );
    const splits = Object.entries(info.splits);
    at("splits").hidden = splits.length < 2;
    at("splits").querySelector(".chips").replaceChildren(
      ...splits.map(([split, count]) => {
        const chip = document.createElement("button");
        chip.type = "button";
        chip.dataset.split = split;
        chip.textContent = `${split} (${count.toLocaleString("en")})`;
        return chip;
      }),
    );
    this.value = kept;
  }

  get value() {
    const point = this.points[Number(at("point").value)];
    const usual = this.info?.default;
    const same = !point || (usual && point.nprobe === usual.nprobe && point.refine === usual.refine);
    return {
      k: Number(at("k").value),
      point: same ? null : { nprobe: point.nprobe, refine: point.refine },
      exact: at("exact").checked && !at("exact-line").hidden,
      rerank: at("rerank").value,
      splits: [...this.splits],
      prefix: at("prefix").value,
    };
  }

  set value(value) {
    const { nprobe, refine } = value.point || this.info?.default || {};
    const found = this.points.findIndex((point) => point.nprobe === nprobe && point.refine === refine);
    at("point").value = found < 0 ? this.points.length - 1 : found;
    if (value.k && ![...at("k").options].some((option) => Number(option.value) === value.k)) at("k").add(new Option(value.k));
    at("k").value = String(value.k || 50);
    at("exact").checked = Boolean(value.exact);
    at("rerank").value = value.rerank;
    if (at("rerank").selectedIndex < 0) at("rerank").selectedIndex = 0;
    at("prefix").value = value.prefix;
    const known = new Set(Object.keys(this.info?.splits || {}));
    this.splits = new Set(value.splits.filter((split) => known.has(split)));
    for (const chip of at("splits").querySelectorAll("button")) {
      chip.setAttribute("aria-pressed", this.splits.has(chip.dataset.split));
    }
    this.#say();
  }

  /** As the API names them. */
  get request() {
    const { k, point, exact, rerank, splits, prefix } = this.value;
    return {
      k,
      nprobe: exact ? null : point?.nprobe ?? null,
      refine: exact ? null : point?.refine ?? null,
      exact,
      rerank,
      splits: splits.length ? splits : null,
      prefix,
    };
  }

  #say() {
    const exact = at("exact").checked && !at("exact-line").hidden;
    at("point").disabled = exact;
    const point = this.points[Number(at("point").value)];
    const said = at("point-said");
    said.replaceChildren();
    if (exact) {
      said.append("finds all there is to find: recall ", bold("1"));
    } else if (point) {
      const stale = this.info.points_stale ? ", before the last change" : "";
      said.append("recall ", bold(point.worst.toFixed(3)), " · index ", bold(milliseconds(point.latency_ms)), ` (measured${stale})`);
    }
    at("point").setAttribute("aria-valuetext", said.textContent || "the index's own");
  }
}

function bold(text) {
  const element = document.createElement("b");
  element.textContent = text;
  return element;
}

export const milliseconds = (ms) => (ms < 10 ? `${ms.toFixed(ms < 1 ? 2 : 1)} ms` : `${Math.round(ms).toLocaleString("en")} ms`);
