// The photo that is searched with, and the box on it. A box is [x1, y1, x2, y2] in fractions of the photo.

const LEAST = 0.03; // a smaller box is a slip of the hand
const STEP = 0.02;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

export class PhotoStage {
  /** @param changed called with the box, or null, when it is done changing */
  constructor(changed) {
    this.stage = document.getElementById("stage");
    this.image = document.getElementById("photo");
    this.handle = document.getElementById("box");
    this.changed = changed;
    this.box = null;
    this.drag = null;
    this.image.addEventListener("load", () => {
      this.stage.style.setProperty("--ratio", this.image.naturalWidth / this.image.naturalHeight);
    });
    this.stage.addEventListener("pointerdown", (event) => this.#begin(event));
    this.stage.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) this.stage.addEventListener(kind, (event) => this.#end(event));
    this.handle.addEventListener("keydown", (event) => this.#key(event));
    this.handle.addEventListener("dragstart", (event) => event.preventDefault());
  }

  /** Show a picture; `failed` is called where the browser cannot. */
  show(address, failed) {
    this.image.onerror = failed;
    this.image.src = address;
    this.stage.hidden = false;
  }

  /** Width and height in px; null where the browser does not know them (yet). */
  get size() {
    return this.image.complete && this.image.naturalWidth ? [this.image.naturalWidth, this.image.naturalHeight] : null;
  }

  set(box) {
    this.box = box;
    this.handle.hidden = !box;
    if (!box) return;
    const [x1, y1, x2, y2] = box;
    const style = this.handle.style;
    style.left = `${100 * x1}%`;
    style.top = `${100 * y1}%`;
    style.width = `${100 * (x2 - x1)}%`;
    style.height = `${100 * (y2 - y1)}%`;
    const percent = (value) => Math.round(100 * value);
    this.handle.setAttribute(
      "aria-label",
      `Part that is searched with: ${percent(x2 - x1)} by ${percent(y2 - y1)} percent of the photo, ` +
        `from ${percent(x1)} percent across and ${percent(y1)} percent down`,
    );
  }

  /** A box in the middle, for those who do not draw one. */
  middle() {
    this.set([0.2, 0.2, 0.8, 0.8]);
    this.handle.focus();
    this.changed(this.box);
  }

  clear() {
    this.set(null);
    this.changed(null);
  }

  #at(event) {
    const frame = this.stage.getBoundingClientRect();
    return [
      clamp((event.clientX - frame.left) / frame.width, 0, 1),
      clamp((event.clientY - frame.top) / frame.height, 0, 1),
    ];
  }

  #begin(event) {
    if (event.button !== 0 || this.drag) return;
    const at = this.#at(event);
    const edge = event.target.dataset?.edge;
    const before = this.box;
    if (edge) {
      const [x1, y1, x2, y2] = this.box;
      this.drag = { before, fixed: [edge.includes("w") ? x2 : x1, edge.includes("n") ? y2 : y1] };
    } else if (event.target === this.handle) {
      this.drag = { before, grip: [at[0] - this.box[0], at[1] - this.box[1]] };
    } else {
      this.drag = { before, fixed: at };
    }
    this.drag.pointer = event.pointerId;
    this.stage.setPointerCapture(event.pointerId);
    event.preventDefault();
  }

  #move(event) {
    if (this.drag?.pointer !== event.pointerId) return;
    const [x, y] = this.#at(event);
    if (this.drag.grip) {
      const [x1, y1, x2, y2] = this.box;
      const left = clamp(x - this.drag.grip[0], 0, 1 - (x2 - x1));
      const top = clamp(y - this.drag.grip[1], 0, 1 - (y2 - y1));
      this.set([left, top, left + x2 - x1, top + y2 - y1]);
    } else {
      const [fx, fy] = this.drag.fixed;
      this.set([Math.min(x, fx), Math.min(y, fy), Math.max(x, fx), Math.max(y, fy)]);
    }
    this.drag.moved = true;
  }

  #end(event) {
    if (this.drag?.pointer !== event.pointerId) return;
    const { before, moved } = this.drag;
    this.drag = null;
    if (!moved) return;
    const [x1, y1, x2, y2] = this.box;
    if (event.type === "pointercancel" || x2 - x1 < LEAST || y2 - y1 < LEAST) this.set(before);
    else this.changed(this.box);
  }

  #key(event) {
    const [x1, y1, x2, y2] = this.box;
    const [dx, dy] = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key] || [];
    if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
    } else if (dx === undefined) {
      return;
    } else if (event.shiftKey) {
      this.set([x1, y1, clamp(x2 + dx, x1 + LEAST, 1), clamp(y2 + dy, y1 + LEAST, 1)]);
      this.changed(this.box, 400);
    } else {
      const left = clamp(x1 + dx, 0, 1 - (x2 - x1));
      const top = clamp(y1 + dy, 0, 1 - (y2 - y1));
      this.set([left, top, left + x2 - x1, top + y2 - y1]);
      this.changed(this.box, 400);
    }
    event.preventDefault();
    event.stopPropagation();
  }
}

/** Have every way to bring a photo call `take` with its file: choosing, the camera, pasting, dropping. */
export function bringing(take) {
  const at = (id) => document.getElementById(id);
  for (const [button, input] of [["choose", "file"], ["another", "file"], ["camera", "shot"]]) {
    at(button).addEventListener("click", () => at(input).click());
  }
  for (const id of ["file", "shot"]) {
    at(id).addEventListener("change", () => {
      if (at(id).files.length) take(at(id).files[0]);
      at(id).value = ""; // the same file may be chosen again
    });
  }
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files || [])].find((f) => f.type.startsWith("image/"));
    if (file) {
      event.preventDefault();
      take(file);
    }
  });
  let depth = 0; // every element that is entered tells it
  const carries = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  const mark = (change) => {
    depth = change ? Math.max(0, depth + change) : 0;
    document.body.classList.toggle("dragging", depth > 0);
  };
  document.addEventListener("dragenter", (event) => carries(event) && mark(1));
  document.addEventListener("dragleave", (event) => carries(event) && mark(-1));
  document.addEventListener("dragover", (event) => carries(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    mark(0);
    if (!carries(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}
