// A picture under a grid of cells that a finger, a mouse or the keyboard can paint or point at.
//
// anywidget calls `render` once for every place in which a pad appears. `model` holds the values
// that are shared with Python (the traits of PatchPad), `ui` the elements of that one place.

const TEMPLATE = `
<div class="beit-pad">
  <img alt=""><div class="cells" role="grid"></div><div class="boxes"></div>
</div>
<div class="beit-status" role="status"></div>`;

// Calls each function once after some of its traits have changed; returns how to end that.
function follow(model, wishes) {
  const heard = Object.entries(wishes).flatMap(([names, show]) => {
    let waits = false;
    const soon = () => {
      if (waits) return;
      waits = true;
      queueMicrotask(() => {
        waits = false;
        show();
      });
    };
    return names.split(" ").map((name) => [`change:${name}`, soon]);
  });
  heard.forEach(([event, show]) => model.on(event, show));
  return () => heard.forEach(([event, show]) => model.off(event, show));
}

const clip = (x, n) => Math.max(0, Math.min(n - 1, Math.floor(x)));

// ---------------------------------------------------------------------------- drawing

function showPicture(model, ui) {
  URL.revokeObjectURL(ui.image.src);
  ui.image.src = URL.createObjectURL(new Blob([model.get("picture")]));
}

function buildGrid(model, ui) {
  const rows = model.get("rows");
  const cols = model.get("cols");
  ui.place.style.setProperty("--width", `${model.get("width")}px`);
  ui.pad.style.aspectRatio = `${cols} / ${rows}`;
  const template = `repeat(${rows}, minmax(0, 1fr)) / repeat(${cols}, minmax(0, 1fr))`;
  ui.grid.style.gridTemplate = template;
  ui.boxes.style.gridTemplate = template;

  const make = (role) => Object.assign(document.createElement("div"), { role });
  const makeRow = () => {
    const row = make("row");
    row.append(...Array.from({ length: cols }, () => make("gridcell")));
    return row;
  };
  ui.grid.replaceChildren(...Array.from({ length: rows }, makeRow));
  ui.cells = [...ui.grid.querySelectorAll("[role=gridcell]")];
}

// Which cells are marked, where the cursor is, and a sentence for each cell ("patch 2,9 masked")
// for those who listen to a screen instead of seeing it. In mode "pick" the cursor is what is
// selected, and a cell is called by its place, with a note if there is one; a cursor beyond the last
// cell selects none.
function showCells(model, ui) {
  const marked = new Set(model.get("marked"));
  const cursor = model.get("cursor");
  const cols = model.get("cols");
  const words = model.get("words");
  const notes = model.get("notes");
  const pick = model.get("mode") == "pick";
  ui.pad.classList.toggle("pick", pick);
  ui.pad.classList.toggle("unringed", !model.get("ring"));
  ui.pad.classList.toggle("brush", model.get("brush") > 0);
  ui.pad.style.setProperty("--ink", model.get("ink"));
  ui.grid.ariaLabel = model.get("label");
  ui.cells.forEach((cell, i) => {
    const place = `${Math.floor(i / cols)},${i % cols}`;
    const state = notes[i] ?? (pick ? "" : words[+marked.has(i)]);
    cell.ariaSelected = pick ? i == cursor : marked.has(i);
    cell.classList.toggle("marked", marked.has(i));
    cell.tabIndex = i == (cursor < ui.cells.length ? cursor : 0) ? 0 : -1;
    cell.ariaLabel = [model.get("unit"), place, state].join(" ").trim();
  });
  if (ui.grid.contains(document.activeElement)) {
    ui.cells[cursor]?.focus({ preventScroll: true });
  }
  showStatus(ui);
}

// The sentence of the cell under the pointer, or of the one that was touched last.
function showStatus(ui) {
  ui.status.textContent = ui.cells[ui.here]?.ariaLabel ?? "";
}

function showBoxes(model, ui) {
  const boxes = model.get("boxes").map(([top, left, height, width, color, line]) => {
    const box = document.createElement("div");
    box.style.gridArea = `${top + 1} / ${left + 1} / span ${height} / span ${width}`;
    box.style.setProperty("--color", color);
    box.className = line;
    return box;
  });
  ui.boxes.replaceChildren(...boxes);
}

// ---------------------------------------------------------------------------- changing

// The cell and, with a brush, those around it that lie in its circle.
function underBrush(model, cell) {
  const [brush, rows, cols] = ["brush", "rows", "cols"].map((name) => model.get(name));
  const [row, col] = [Math.floor(cell / cols), cell % cols];
  const cells = [];
  for (let r = Math.max(0, row - brush); r <= Math.min(rows - 1, row + brush); r++) {
    for (let c = Math.max(0, col - brush); c <= Math.min(cols - 1, col + brush); c++) {
      if ((r - row) ** 2 + (c - col) ** 2 <= brush ** 2) cells.push(r * cols + c);
    }
  }
  return cells;
}

// Marks or unmarks cells and moves the cursor. The screen changes before Python hears of it.
function change(model, ui, cells, cursor, mark) {
  const marked = new Set(model.get("marked"));
  if (model.get("mode") == "paint") {
    const touched = cells.flatMap((i) => underBrush(model, i));
    touched.forEach((i) => (mark ? marked.add(i) : marked.delete(i)));
  }
  model.set({ marked: [...marked].sort((a, b) => a - b), cursor });
  model.save_changes();
  ui.here = cursor;
  showStatus(ui);
}

// What follows is one stroke, for whoever takes strokes back. It is sent with the change.
function beginStroke(model) {
  model.set({ stroke: model.get("stroke") + 1 });
}

// The cells on a straight line between two cells, both included.
function cellsBetween(from, to, cols) {
  const row = Math.floor(from / cols);
  const col = from % cols;
  const down = Math.floor(to / cols) - row;
  const right = (to % cols) - col;
  const steps = Math.max(Math.abs(down), Math.abs(right));
  return Array.from({ length: steps + 1 }, (_, k) => {
    const r = Math.round(row + (down * k) / (steps || 1));
    const c = Math.round(col + (right * k) / (steps || 1));
    return r * cols + c;
  });
}

function listenToPointer(model, ui) {
  let mark = null; // what the pressed finger does: true marks, false unmarks, null: not pressed
  let last = null; // the cell where it was

  const cellUnder = (event) => {
    const rows = model.get("rows");
    const cols = model.get("cols");
    const area = ui.grid.getBoundingClientRect();
    const row = clip(((event.clientY - area.top) / area.height) * rows, rows);
    const col = clip(((event.clientX - area.left) / area.width) * cols, cols);
    return row * cols + col;
  };

  // Python may want to know over which cell the pointer hovers; -1: over none.
  const point = (cell) => {
    ui.here = cell;
    showStatus(ui);
    if (!model.get("hovers") || cell == model.get("pointed")) return;
    model.set({ pointed: cell });
    model.save_changes();
  };

  ui.grid.onpointerdown = (event) => {
    if (event.button) return; // the first button only
    event.preventDefault();
    ui.grid.setPointerCapture(event.pointerId);
    last = cellUnder(event);
    mark = model.get("brush") > 0 || !model.get("marked").includes(last); // strokes may cross
    ui.cells[last].focus({ preventScroll: true });
    beginStroke(model);
    change(model, ui, [last], last, mark);
  };
  ui.grid.onpointermove = (event) => {
    const here = cellUnder(event);
    if (mark === null) {
      point(here);
    } else if (here != last) {
      const cells = cellsBetween(last, here, model.get("cols"));
      last = here;
      change(model, ui, cells, here, mark);
    }
  };
  ui.grid.onpointerleave = () => point(-1);
  const release = () => {
    mark = null;
  };
  ui.grid.onpointerup = release;
  ui.grid.onpointercancel = release;
}

const STEPS = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  Home: [0, -999],
  End: [0, 999],
};

function listenToKeys(model, ui) {
  ui.grid.onkeydown = (event) => {
    const cursor = model.get("cursor");
    const rows = model.get("rows");
    const cols = model.get("cols");
    if (event.key in STEPS) {
      const [down, right] = STEPS[event.key];
      const row = clip(Math.floor(cursor / cols) + down, rows);
      const col = clip((cursor % cols) + right, cols);
      change(model, ui, [], row * cols + col);
    } else if (event.key == " " || event.key == "Enter") {
      beginStroke(model);
      change(model, ui, [cursor], cursor, !model.get("marked").includes(cursor));
    } else {
      return; // not ours
    }
    event.preventDefault();
    event.stopPropagation();
  };
}

// ---------------------------------------------------------------------------- one place

function render({ model, el }) {
  el.innerHTML = TEMPLATE;
  el.addEventListener("focusin", (event) => {
    event.target.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves the keys to us
  });
  el.classList.add("beit-place");
  const ui = {
    place: el,
    pad: el.querySelector(".beit-pad"),
    image: el.querySelector("img"),
    grid: el.querySelector(".cells"),
    boxes: el.querySelector(".boxes"),
    status: el.querySelector(".beit-status"),
  };
  const rebuild = () => {
    buildGrid(model, ui);
    showCells(model, ui);
    showBoxes(model, ui);
  };
  const unfollow = follow(model, {
    picture: () => showPicture(model, ui),
    "rows cols width": rebuild,
    "marked cursor mode notes words unit label ink ring brush": () => showCells(model, ui),
    boxes: () => showBoxes(model, ui),
  });

  showPicture(model, ui);
  rebuild();
  listenToPointer(model, ui);
  listenToKeys(model, ui);
  return () => {
    unfollow();
    URL.revokeObjectURL(ui.image.src);
  };
}

export default { render };
