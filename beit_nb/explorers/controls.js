// The parts of an explorer besides its pads: the guide on top, sliders, menus, fields, a button that
// takes pictures, a picture that can be touched, and a line of code to copy.
//
// anywidget calls `render` once for every place in which a part appears; `kind` says which part it
// is. All are plain HTML elements, so that keyboard, screen readers, zoom and narrow windows are
// the browser's work.

// ---------------------------------------------------------------------------- what parts share

// Calls each function now, and again whenever one of its traits changes; returns how to end that.
function follow(model, wishes) {
  const heard = Object.entries(wishes).flatMap(([names, show]) =>
    names.split(" ").map((name) => [`change:${name}`, show]),
  );
  heard.forEach(([event, show]) => model.on(event, show));
  Object.values(wishes).forEach((show) => show());
  return () => heard.forEach(([event, show]) => model.off(event, show));
}

// Calls `begin` with the explorer around an element as soon as it stands on the page; returns how
// to undo what `begin` did.
function whenPlaced(el, begin) {
  let end = () => {};
  let looks = 0;
  let waiting = requestAnimationFrame(function look() {
    const explorer = el.closest(".beit-explorer");
    if (explorer) end = begin(explorer);
    else if (++looks < 600) waiting = requestAnimationFrame(look); // ten seconds
  });
  return () => {
    cancelAnimationFrame(waiting);
    end();
  };
}

// Listens to events of an element; returns how to end that.
function listen(element, handlers) {
  const all = Object.entries(handlers);
  all.forEach(([name, handler]) => element.addEventListener(name, handler));
  return () => all.forEach(([name, handler]) => element.removeEventListener(name, handler));
}

const tell = (model, values) => {
  model.set(values);
  model.save_changes();
};

// ---------------------------------------------------------------------------- guide

const GUIDE = `
<div class="beit-guide">
  <p class="see"></p>
  <ol class="acts"></ol>
  <p class="notice" role="status"></p>
  <p class="error" role="alert"></p>
  <p class="said" role="status"></p>
</div>`;

const isDark = () =>
  document.body.dataset.jpThemeLight == "false" || document.body.classList.contains("vscode-dark");

function renderGuide(model, el) {
  el.innerHTML = GUIDE;
  const part = (name) => el.querySelector(`.${name}`);
  const showWords = () => {
    for (const name of ["see", "error", "said"]) part(name).textContent = model.get(name);
  };
  const showActs = () => {
    const done = model.get("done");
    const acts = model.get("acts").map((words, i) => {
      const act = document.createElement("li");
      act.textContent = words;
      act.classList.toggle("done", done.includes(i));
      act.ariaLabel = done.includes(i) ? `done: ${words}` : words;
      return act;
    });
    part("acts").replaceChildren(...acts);
    const all = acts.length > 0 && done.length == acts.length;
    part("notice").textContent = all ? model.get("notice") : "";
  };
  const unfollow = follow(model, { "see error said": showWords, "acts done notice": showActs });

  // Figures are drawn in Python and need to know the ground on which they will lie.
  const lookAround = () => tell(model, { ground: [isDark(), devicePixelRatio > 1.25 ? 2 : 1] });
  const watcher = new MutationObserver(lookAround);
  watcher.observe(document.body, { attributeFilter: ["data-jp-theme-light", "class"] });
  lookAround();

  // What is typed inside an explorer is meant for it, and not for JupyterLab's shortcuts, among
  // which a single letter cuts the cell. JupyterLab looks for this mark on the focused element.
  const unplace = whenPlaced(el, (explorer) =>
    listen(explorer, {
      focusin: (event) => {
        event.target.dataset.lmSuppressShortcuts = "true";
      },
    }),
  );
  return () => {
    unfollow();
    unplace();
    watcher.disconnect();
  };
}

// ---------------------------------------------------------------------------- slider

const SLIDER = `
<div class="beit-slider">
  <span class="name"></span>
  <span class="track"><input type="range" min="0" step="1"><span class="marks"></span></span>
  <output></output>
  <div class="says" role="alert"></div>
</div>`;

function renderSlider(model, el) {
  el.innerHTML = SLIDER;
  const part = (name) => el.querySelector(name);
  const input = part("input");
  const move = (index) => tell(model, { index: Number(index) });
  input.oninput = () => move(input.value);

  const show = () => {
    const texts = model.get("texts");
    const text = texts[model.get("index")];
    input.max = texts.length - 1;
    input.value = model.get("index");
    input.disabled = model.get("disabled");
    input.ariaLabel = model.get("label");
    input.ariaValueText = text;
    part("output").textContent = text;
    part(".name").textContent = model.get("label");
    part(".beit-slider").title = model.get("help");
    part(".beit-slider").classList.toggle("idle", input.disabled);
  };
  const showMarks = () => {
    const last = model.get("texts").length - 1 || 1;
    const marks = model.get("marks").map(([index, name]) => {
      const mark = document.createElement("button");
      mark.textContent = name;
      mark.title = `set it to ${model.get("texts")[index]}`;
      mark.style.setProperty("--at", index / last);
      mark.disabled = model.get("disabled");
      mark.onclick = () => move(index);
      return mark;
    });
    part(".marks").replaceChildren(...marks);
  };
  const complain = () => {
    part(".says").textContent = model.get("says");
    input.ariaInvalid = String(model.get("says") != "");
  };
  return follow(model, {
    "index texts disabled label help": show,
    "texts marks disabled": showMarks,
    says: complain,
  });
}

// ---------------------------------------------------------------------------- menu and field

const labelled = (element) => `
<label class="beit-labelled"><span class="name"></span>${element}</label>
<div class="says" role="alert"></div>`;

// The name, the tooltip and the complaint of a menu or a field.
function followLabel(model, el, control) {
  const show = () => {
    el.querySelector(".name").textContent = model.get("label");
    el.querySelector("label").title = model.get("help");
    el.querySelector(".says").textContent = model.get("says");
    control.ariaLabel = model.get("label");
    control.disabled = model.get("disabled");
    control.ariaInvalid = String(model.get("says") != "");
  };
  return follow(model, { "label help says disabled": show });
}

function renderMenu(model, el) {
  el.innerHTML = labelled("<select></select>");
  const select = el.querySelector("select");
  select.onchange = () => tell(model, { index: select.selectedIndex });
  const unlabel = followLabel(model, el, select);
  const show = () => {
    const names = model.get("names");
    if (names.length != select.options.length || names.some((n, i) => n != select.options[i].text)) {
      select.replaceChildren(...names.map((name) => new Option(name)));
    }
    select.selectedIndex = model.get("index");
  };
  const unfollow = follow(model, { "names index": show });
  return () => {
    unlabel();
    unfollow();
  };
}

function renderField(model, el) {
  el.innerHTML = labelled('<input type="number" step="1">');
  const input = el.querySelector("input");
  const complain = (words) => {
    el.querySelector(".says").textContent = words;
  };
  const take = () => {
    complain(model.get("says"));
    if (input.checkValidity() && input.value != "") tell(model, { value: Number(input.value) });
    else {
      input.value = model.get("value"); // what cannot be is taken back
      complain(`only whole numbers from ${model.get("min")} to ${model.get("max")}`);
    }
  };
  input.onchange = take;
  input.onkeydown = (event) => {
    if (event.key == "Enter") take(); // JupyterLab keeps the browser from it
  };
  const unlabel = followLabel(model, el, input);
  const show = () => {
    input.min = model.get("min");
    input.max = model.get("max");
    input.value = model.get("value");
  };
  const unfollow = follow(model, { "value min max": show });
  return () => {
    unlabel();
    unfollow();
  };
}

// ---------------------------------------------------------------------------- upload

const UPLOAD = `
<div class="beit-upload">
  <label><input type="file" accept="image/*"><span>Upload</span></label>
  <div class="says" role="alert"></div>
  <div class="notes" role="status"></div>
</div>`;
const AS_IT_IS = 2 * 2 ** 20; // bytes that are sent without making the picture smaller
const MOST = 8 * 2 ** 20; // bytes that any server takes
const SIDE = 1024; // pixels of the shorter side that are enough

// What to send for a file: itself, or a smaller copy of the picture that it holds.
async function smaller(file) {
  if (file.size <= AS_IT_IS) return file;
  try {
    const picture = await createImageBitmap(file, { imageOrientation: "from-image" });
    const scale = Math.min(1, SIDE / Math.min(picture.width, picture.height));
    const width = Math.max(1, Math.round(picture.width * scale));
    const height = Math.max(1, Math.round(picture.height * scale));
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").drawImage(picture, 0, 0, width, height);
    return await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  } catch {
    if (file.size <= MOST) return file; // Python knows formats that a browser does not
    throw Error(`${file.name} is no picture that this browser can read; take a PNG or JPEG`);
  }
}

function renderUpload(model, el) {
  el.innerHTML = UPLOAD;
  const input = el.querySelector("input");
  const take = async (file) => {
    if (!file) return;
    const count = model.get("count") + 1; // the same file again is news, too
    try {
      const bytes = await (await smaller(file)).arrayBuffer();
      tell(model, { name: file.name, problem: "", content: new DataView(bytes), count });
    } catch (error) {
      tell(model, { name: file.name, problem: error.message, count });
    }
  };
  input.onchange = () => {
    take(input.files[0]);
    input.value = "";
  };
  const show = () => {
    el.querySelector("label").title = model.get("help");
    el.querySelector(".says").textContent = model.get("says");
    el.querySelector(".notes").textContent = model.get("notes");
  };
  const unfollow = follow(model, { "help says notes": show });

  // A picture may be dropped anywhere on the explorer, or pasted into it.
  const unplace = whenPlaced(el, (explorer) =>
    listen(explorer, {
      dragover: (event) => {
        if (event.dataTransfer.types.includes("Files")) event.preventDefault();
      },
      drop: (event) => {
        event.preventDefault();
        event.stopPropagation();
        take(event.dataTransfer.files[0]);
      },
      paste: (event) => take(event.clipboardData.files[0]),
    }),
  );
  return () => {
    unfollow();
    unplace();
  };
}

// ---------------------------------------------------------------------------- picture

function renderPicture(model, el) {
  const image = document.createElement("img");
  image.className = "beit-picture";
  image.draggable = false;
  el.append(image);
  const show = () => {
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(new Blob([model.get("picture")]));
  };
  const describe = () => {
    image.alt = model.get("alt");
    image.title = model.get("help");
    image.style.width = `${model.get("width")}px`;
    image.classList.toggle("touchable", model.get("touchable"));
  };
  const unfollow = follow(model, { picture: show, "alt help width touchable": describe });

  let pressed = false;
  let start = []; // where; a busy kernel may hear of the drag only
  let count = 0; // so that a second touch of the same place is news
  const touch = (kind, event) => {
    const hovering = kind == "hover" || kind == "leave";
    if (!model.get("touchable") || (hovering && !model.get("hovers"))) return;
    const area = image.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width;
    const y = (event.clientY - area.top) / area.height;
    if (kind == "press") start = [x, y];
    tell(model, { touch: [kind, x, y, ++count, ...start] });
  };
  image.onpointerdown = (event) => {
    if (event.button || !model.get("touchable")) return;
    event.preventDefault();
    image.setPointerCapture(event.pointerId);
    pressed = true;
    touch("press", event);
  };
  image.onpointermove = (event) => touch(pressed ? "drag" : "hover", event);
  image.onpointerleave = (event) => touch("leave", event);
  image.onpointerup = image.onpointercancel = () => {
    pressed = false;
  };
  return () => {
    unfollow();
    URL.revokeObjectURL(image.src);
  };
}

// ---------------------------------------------------------------------------- tiles

// Radio buttons that are small pictures, cut from one: a table of them with names around it, or
// (with bars) a list. A table's tiles have patches, of which one may be marked in all of them.
function renderTiles(model, el) {
  el.innerHTML = '<div class="beit-tiles" role="radiogroup"></div>';
  const table = el.firstChild;
  const group = `tiles-${Math.random()}`; // radio buttons of one name belong together
  const make = (tag, className, text = "") =>
    Object.assign(document.createElement(tag), { className, textContent: text });
  let sheet = "";

  const makeTile = (i) => {
    const tile = make("label", "tile");
    const input = Object.assign(make("input", ""), { type: "radio", name: group, value: i });
    input.onchange = () => tell(model, { index: i });
    tile.append(input, make("i", ""));
    tile.style.setProperty("--x", i % model.get("cols"));
    tile.style.setProperty("--y", Math.floor(i / model.get("cols")));
    return tile;
  };
  const makeBar = ([share, text]) => {
    const bar = make("span", "bar");
    bar.append(make("span", ""));
    bar.firstChild.style.width = `${100 * share}%`;
    return [bar, make("span", "odds", text)];
  };
  const build = () => {
    const [cols, heads, bars] = [model.get("cols"), model.get("heads"), model.get("bars")];
    const parts = heads.length ? ["", ...heads].map((name) => make("span", "head", name)) : [];
    model.get("sides").forEach((side, row) => {
      const tiles = Array.from({ length: cols }, (_, col) => makeTile(row * cols + col));
      parts.push(make("span", "side", side), ...tiles, ...(bars[row] ? makeBar(bars[row]) : []));
    });
    table.style.setProperty("--cols", cols);
    table.style.setProperty("--rows", model.get("sides").length);
    table.classList.toggle("list", bars.length > 0);
    table.ariaLabel = model.get("label");
    table.title = model.get("help");
    table.replaceChildren(...parts);
    name();
    choose();
  };
  const inputs = () => [...table.querySelectorAll("input")];
  const name = () =>
    inputs().forEach((input, i) => {
      input.ariaLabel = input.parentElement.title = model.get("names")[i] ?? "";
    });
  const choose = () =>
    inputs().forEach((input, i) => {
      input.checked = i == model.get("index");
    });
  const paint = () => {
    URL.revokeObjectURL(sheet);
    sheet = URL.createObjectURL(new Blob([model.get("picture")]));
    table.style.setProperty("--sheet", `url(${sheet})`);
  };
  const mark = () => {
    const [rows, cols] = model.get("patches");
    const here = model.get("pointed");
    table.classList.toggle("pointed", here >= 0);
    const values = { rows, cols, row: Math.floor(here / cols), col: here % cols };
    for (const [name, value] of Object.entries(values)) {
      table.style.setProperty(`--patch-${name}`, value);
    }
  };
  const point = (here) => {
    if (here != model.get("pointed")) tell(model, { pointed: here });
  };
  table.onpointermove = (event) => {
    const [rows, cols] = model.get("patches");
    const tile = event.target.closest(".tile");
    if (!tile || rows * cols == 1) return point(-1);
    const area = tile.getBoundingClientRect();
    const at = (share, n) => Math.max(0, Math.min(n - 1, Math.floor(share * n)));
    const row = at((event.clientY - area.top) / area.height, rows);
    point(row * cols + at((event.clientX - area.left) / area.width, cols));
  };
  table.onpointerleave = () => point(-1);
  table.onkeydown = (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const next = inputs()[Number(event.target.value) + step * model.get("cols")];
    if (!step || model.get("cols") == 1) return; // the browser moves in a list by itself
    event.preventDefault();
    next?.focus();
    next?.click();
  };
  const unfollow = follow(model, {
    "cols heads sides bars label help": build,
    names: name,
    index: choose,
    picture: paint,
    "patches pointed": mark,
  });
  return () => {
    unfollow();
    URL.revokeObjectURL(sheet);
  };
}

// ---------------------------------------------------------------------------- line of code

const CODE = `
<div class="beit-code">
  <code></code><button title="copy this line; run in a cell, it makes what you see">Copy</button>
</div>`;

function renderCode(model, el) {
  el.innerHTML = CODE;
  const code = el.querySelector("code");
  const button = el.querySelector("button");
  let waiting;
  const say = (words) => {
    button.textContent = words;
    clearTimeout(waiting);
    waiting = setTimeout(() => (button.textContent = "Copy"), 2000); // it can be pressed again
  };
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(model.get("code"));
      say("Copied");
    } catch {
      getSelection().selectAllChildren(code); // the browser forbids it: one more key press
      say("Press Ctrl+C");
    }
  };
  const show = () => {
    el.hidden = model.get("code") == "";
    code.textContent = model.get("code");
    button.textContent = "Copy";
  };
  const unfollow = follow(model, { code: show });
  return () => {
    unfollow();
    clearTimeout(waiting);
  };
}

// ---------------------------------------------------------------------------- all of them

const PARTS = {
  guide: renderGuide,
  slider: renderSlider,
  menu: renderMenu,
  field: renderField,
  upload: renderUpload,
  picture: renderPicture,
  tiles: renderTiles,
  code: renderCode,
};

export default { render: ({ model, el }) => PARTS[model.get("kind")](model, el) };
