// The address of a search: a stored photo, a box, settings. A photo of one's own has no address.

const number = (text, low, high) => {
  const value = text === null || text === "" ? NaN : Number(text);
  return Number.isFinite(value) && value >= low && value <= high ? value : null;
};

/** What the address says; what it says wrongly is as if it were not there. */
export function read(text) {
  const query = new URLSearchParams(text);
  const point = /^(\d{1,7})x(\d{1,3})$/.exec(query.get("point") || "");
  const sides = (query.get("box") || "").split(",").map((side) => number(side, 0, 1));
  const id = /^\d{1,18}$/.test(query.get("id") || "") ? Number(query.get("id")) : null;
  return {
    id: Number.isSafeInteger(id) ? id : null,
    box: sides.length === 4 && !sides.includes(null) && sides[0] < sides[2] && sides[1] < sides[3] ? sides : null,
    settings: {
      k: number(query.get("k"), 1, 1000),
      point: point ? { nprobe: Number(point[1]), refine: Number(point[2]) } : null,
      exact: query.get("exact") === "1",
      rerank: query.get("rerank") || "",
      splits: query.getAll("split").slice(0, 16),
      prefix: (query.get("prefix") || "").slice(0, 200),
    },
  };
}

/** The address of a search, without what is as it is anyway. */
export function write({ id = null, box = null, settings }) {
  const query = new URLSearchParams();
  if (id !== null) query.set("id", id);
  if (id !== null && box) query.set("box", box.map((side) => side.toFixed(4)).join(","));
  if (settings.k !== 50) query.set("k", settings.k);
  if (settings.exact) query.set("exact", "1");
  else if (settings.point) query.set("point", `${settings.point.nprobe}x${settings.point.refine}`);
  if (settings.rerank) query.set("rerank", settings.rerank);
  settings.splits.forEach((split) => query.append("split", split));
  if (settings.prefix) query.set("prefix", settings.prefix);
  const text = query.toString();
  return text ? `/?${text}` : "/";
}
