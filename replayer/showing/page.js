"use strict";
(() => {

// ---- Data -----------------------------------------------------------------------------------

const D = JSON.parse(document.getElementById("data").textContent);
const COUNT = Math.max(0, ...Object.values(D.rows).map((values) => values.length));
const FIRST = { bitwise: D.first.bitwise ?? null, tolerance: D.first.tolerance ?? null };
const absent = new Array(COUNT).fill(null);
const column = (key) => D.rows[key] || absent;
const LABEL = column("label"), NAME = column("name"), KIND = column("kind");
const OUTCOME = column("outcome"), STEP = column("step"), RANK = column("rank");
const OCCURRENCE = column("occurrence"), LAYER = column("layer"), REORDERED = column("reordered");
const GRAFTED = column("grafted");
const RANKS_DIFFER = column("ranks_differ"), MESSAGE = column("message"), WHERE = column("where");

// Both from the worst on, as the terminal has them: the outcomes, and each pair's place in the table.
const OUTCOMES = D.outcomes, RANKING = column("worst");
const WORDS = {
  error: "error", shape: "shape", differs: "differs", unmeasured: "unmeasured",
  only_a: "only in A", only_b: "only in B", close: "close", equal: "equal", reordered: "reordered",
};
const SIGNS = {
  error: "!", shape: "□", differs: "≠", unmeasured: "?", only_a: "A", only_b: "B", close: "≈",
  equal: "=", reordered: "↕",
};
const MEANINGS = {
  equal: "bit for bit the same", close: "differs within tolerance", differs: "beyond tolerance",
  unmeasured: "differs by digest, elements not at hand", shape: "unequal shapes",
  only_a: "tapped in A only", only_b: "tapped in B only", error: "could not be compared",
  reordered: "came in another order",
};
const MEASURES = { rel_diff: "rel diff", max_abs: "max abs", mean_abs: "mean abs", times_floor: "times floor" };
const APART = new Set(["shape", "differs", "unmeasured"]), BAD = new Set(["error", ...APART]);

function number(value) {
  if (value === "inf") return Infinity;
  if (value === "-inf") return -Infinity;
  return typeof value === "number" ? value : null;
}

function sizeOf(value) {
  const x = number(value);
  return x === null ? null : Math.abs(x);
}

const measured = new Map(); // per measure: each row's size of it, or null for no figure
function measure(key) {
  if (!measured.has(key)) {
    measured.set(key, column(key).map((value, i) => (OUTCOME[i] === "equal" ? 0 : sizeOf(value))));
  }
  return measured.get(key);
}

// A gradient is a series of its own beside its tensor.
const SERIES = NAME.map((name, i) => (KIND[i] === "grad" ? `${name} (grad)` : String(name)));

// ---- Words ----------------------------------------------------------------------------------

const thousands = (n) => String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, ",");
const some = (n, one, more) => `${thousands(n)} ${n === 1 ? one : more || one + "s"}`;

function figure(value) {
  const x = number(value);
  if (x === null) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e-3 && size < 999.5) return x.toPrecision(3);
  const [digits, power] = x.toExponential(2).split("e");
  return `${digits}e${power[0]}${power.slice(1).padStart(2, "0")}`;
}
function whole(value) {
  if (!Number.isInteger(value)) return figure(value);
  return (value < 0 ? "-" : "") + thousands(Math.abs(value));
}
const power = (exponent) => `1e${exponent}`;

function ranges(numbers) { // 0, 1, 2, 5 -> "0-2, 5"
  const sorted = [...new Set(numbers)].sort((x, y) => x - y), parts = [];
  for (let i = 0; i < sorted.length; i++) {
    const start = sorted[i];
    while (sorted[i + 1] === sorted[i] + 1) i++;
    parts.push(start === sorted[i] ? `${start}` : `${start}-${sorted[i]}`);
  }
  return parts.join(", ");
}

function fewRanges(numbers, room = 40) { // cut where they would fill lines
  const text = ranges(numbers);
  return text.length <= room ? text : `${text.slice(0, text.lastIndexOf(",", room))} and more`;
}

function ranksOf(i) {
  if (RANKS_DIFFER[i] && RANKS_DIFFER[i].length) return RANKS_DIFFER[i];
  return RANK[i] === null ? [] : [RANK[i]];
}

function place(i) {
  const parts = [`step ${STEP[i] ?? "?"}`];
  if (RANK[i] !== null) parts.push(`rank ${RANK[i]}`);
  else if (ranksOf(i).length === 1) parts.push(`rank ${ranksOf(i)[0]} differs`);
  else if (ranksOf(i).length) parts.push(`ranks ${fewRanges(ranksOf(i))} differ`);
  if (OCCURRENCE[i]) parts.push(`occurrence ${OCCURRENCE[i]}`);
  if (KIND[i] && KIND[i] !== "tensor") parts.push(KIND[i]);
  return parts.join(", ");
}

function describe(i) {
  const parts = [`${LABEL[i]}, ${place(i)}: ${WORDS[OUTCOME[i]] || OUTCOME[i]}`];
  if (OUTCOME[i] !== "equal") {
    for (const key of Object.keys(MEASURES)) {
      const value = column(key)[i];
      if (number(value) !== null) parts.push(`${MEASURES[key]} ${figure(value)}`);
    }
    if (WHERE[i]) parts.push(`largest at ${WHERE[i]}`);
    if (MESSAGE[i]) parts.push(MESSAGE[i]);
  }
  return parts.join("; ");
}

// ---- DOM ------------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const say = (section, text) => byId(section).append(make("p", { class: "soft" }, text));

function leaveOut(section) { // which has nothing to show, and its link with it
  byId(section).hidden = true;
  document.querySelector(`nav a[href="#${section}"]`).closest("li").hidden = true;
}

function bothEnds(text, most) { // long names begin alike: both ends of one are kept
  if (text.length <= most) return text;
  const end = Math.floor((most - 1) / 2);
  return `${text.slice(0, most - 1 - end)}…${text.slice(text.length - end)}`;
}

// ---- Colours --------------------------------------------------------------------------------

// From dark blue to yellow, lighter throughout: it reads in greyscale and without seeing colours.
const STOPS = [
  "#00204d", "#0f3570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a69d75", "#c7b569", "#e6cf5a", "#ffea46",
].map(channels);
const PALE = ["#e9d98a", "#fff4c4"].map(channels); // the last two on light, so that small differences are calm
let theme;

function channels(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  theme = { font: getComputedStyle(document.body).fontFamily, dark: value("--dark") === "1" };
  for (const name of ["bg", "panel", "ink", "soft", "line", "faint", "accent", "first"]) {
    theme[name] = value(`--${name}`);
  }
}

// The more it differs, the further from the background: dark on light, light on dark.
function shade(t) {
  const stops = theme.dark ? STOPS : [...STOPS.slice(0, -2), ...PALE];
  const at = (theme.dark ? 0.12 + 0.88 * t : 1 - t) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2), part = at - low;
  return stops[low].map((x, k) => Math.round(x + part * (stops[low + 1][k] - x)));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;
function textOn(rgb) {
  const [r, g, b] = rgb.map((x) => ((x / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000000" : "#ffffff";
}

let hatches = null;
function hatch(context) {
  if (!hatches) {
    hatches = document.createElement("canvas");
    hatches.width = hatches.height = 6;
    const pen = hatches.getContext("2d");
    pen.strokeStyle = theme.soft;
    pen.beginPath();
    for (const shift of [-6, 0, 6]) { pen.moveTo(shift - 1, 7); pen.lineTo(shift + 7, -1); }
    pen.stroke();
  }
  return context.createPattern(hatches, "repeat");
}

// A shape, filled or not, a colour on light and one on dark for each series.
const MARKERS = [
  { path: "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z", fill: true, colours: ["#00204d", "#ffea46"] },
  { path: "M-.9,-.9H.9V.9H-.9Z", fill: false, colours: ["#b34700", "#ff9d5c"] },
  { path: "M0,-1.15L1.1,.85H-1.1Z", fill: true, colours: ["#0078b8", "#6cb8f0"] },
  { path: "M0,-1.25L1.1,0L0,1.25L-1.1,0Z", fill: false, colours: ["#005a46", "#4fd1ab"] },
  { path: "M0,1.15L1.1,-.85H-1.1Z", fill: true, colours: ["#8f3f71", "#e8a3cc"] },
  { path: "M-1.1,0H1.1M0,-1.1V1.1", fill: false, colours: ["#4d535e", "#c3ccd6"] },
  { path: "M-.9,-.9L.9,.9M-.9,.9L.9,-.9", fill: false, colours: ["#7a5c00", "#d9b64a"] },
  { path: "M0,-1.2L1.14,-.37L.7,.97H-.7L-1.14,-.37Z", fill: true, colours: ["#3d3d99", "#a9a9ff"] },
  { path: "M-1,-1L1,1V-1L-1,1Z", fill: false, colours: ["#a3282b", "#ff8b85"] },
  { path: "M-.4,-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z", fill: true, colours: ["#2f7a1f", "#8fd97a"] },
];
const OTHERS = { path: "M.6,0A.6,.6,0,1,1,-.6,0A.6,.6,0,1,1,.6,0Z", fill: true, colours: ["#6b7480", "#98a2ae"] };
const colourOf = (marker) => marker.colours[theme.dark ? 1 : 0];

function icon(marker) {
  return draw("svg", { viewBox: "-1.6 -1.6 3.2 3.2", "aria-hidden": "true" }, draw("path", {
    d: marker.path, stroke: colourOf(marker), "stroke-width": 0.4,
    fill: marker.fill ? colourOf(marker) : "none",
  }));
}

// ---- Canvases -------------------------------------------------------------------------------

function pixels(canvas, width, height) {
  const density = Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = Math.max(1, Math.round(width * density));
  canvas.height = Math.max(1, Math.round(height * density));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  context.font = `12px ${theme.font}`;
  context.textBaseline = "middle";
  return context;
}

const shorts = new Map();
function shorten(context, text, width) { // keeps both ends of it
  const key = `${width}|${text}`;
  if (!shorts.has(key)) {
    let kept = String(text).slice(0, 400);
    let short = kept === text ? text : `${kept}…`;
    while (kept.length > 1 && context.measureText(short).width > width) {
      kept = kept.slice(0, -1);
      const half = Math.ceil(kept.length / 2);
      short = `${kept.slice(0, half)}…${text.slice(text.length - (kept.length - half))}`;
    }
    shorts.set(key, short);
  }
  return shorts.get(key);
}

const painters = []; // drawn again when the width or the colours change
function repaint() {
  readTheme();
  hatches = null;
  shorts.clear();
  for (const paint of painters) paint();
}

function logScale(values) { // decades that hold the positive, finite ones; null if there is none
  let low = Infinity, high = 0;
  for (const x of values) {
    if (x === null || !(x > 0) || x === Infinity) continue;
    if (x < low) low = x;
    if (x > high) high = x;
  }
  if (!high) return null;
  const from = Math.floor(Math.log10(low) + 1e-9), to = Math.max(from + 1, Math.ceil(Math.log10(high) - 1e-9));
  const part = (x) => Math.min(1, Math.max(0, (Math.log10(x) - from) / (to - from)));
  return { from, to, at: (x) => (x === Infinity ? 1 : part(x)) };
}

function scaleLegend(scale, text, keys) {
  const holder = make("div", { class: "scale" });
  if (scale) {
    const canvas = make("canvas", { "aria-hidden": "true", class: "gradient" });
    painters.push(() => {
      const context = pixels(canvas, 140, 14);
      for (let x = 0; x < 140; x++) {
        context.fillStyle = css(shade(x / 139));
        context.fillRect(x, 0, 1.5, 14);
      }
    });
    holder.append(make("span", {}, `${text}: ${power(scale.from)}`, canvas, power(scale.to)));
  }
  for (const key of keys) holder.append(make("span", {}, key));
  return holder;
}

// ---- A grid of cells: layer by name, rank by name, and the strip of a tensor -------------------

/* spec: rows, columns: labels; cell(r, c): undefined where there is nothing, {none: true} for a
   hatched cell, or {value, text}; shade(value): 0 to 1; say(r, c): text; open(r, c);
   axis: what the columns are; label: for a screen reader; cellWidth: [least, most]; start: [r, c];
   edge: words below the first and last column in place of a label for each */
function grid(spec) {
  const canvas = make("canvas");
  const spacer = make("div", {}, canvas);
  const scroller = make("div",
    { class: "scroller", tabindex: 0, role: "application", "aria-label": spec.label }, spacer);
  const readout = make("p", { class: spec.edge ? "readout small" : "readout", "aria-live": "polite" }, spec.hint);
  const head = spec.edge ? 2 : 20, line = spec.edge ? 30 : 20;
  let at = null, labels = 0, wide = 0;

  function layout() {
    canvas.style.width = canvas.style.height = "0px";
    spacer.style.width = "0px";
    const room = scroller.clientWidth;
    const context = pixels(canvas, 1, 1);
    labels = 0;
    if (!spec.edge) {
      for (const row of [spec.axis, ...spec.rows]) {
        labels = Math.max(labels, context.measureText(String(row).slice(0, 80)).width + 12);
      }
      labels = Math.ceil(Math.min(labels, room * 0.4, 320));
    }
    const [least, most] = spec.cellWidth;
    wide = Math.min(most, Math.max(least, (room - labels - 16) / spec.columns.length));
    spacer.style.width = `${Math.floor(labels + wide * spec.columns.length) + (spec.edge ? 0 : 2)}px`;
    spacer.style.height = `${head + line * spec.rows.length + 2}px`;
    paint();
  }

  function paint() {
    const width = Math.min(scroller.clientWidth, spacer.offsetWidth);
    const height = Math.min(scroller.clientHeight, spacer.offsetHeight);
    const left = scroller.scrollLeft, top = scroller.scrollTop;
    const context = pixels(canvas, width, height);
    const firstColumn = Math.max(0, Math.floor(left / wide));
    const lastColumn = Math.min(spec.columns.length - 1, Math.floor((left + width - labels) / wide));
    const firstRow = Math.max(0, Math.floor(top / line));
    const lastRow = Math.min(spec.rows.length - 1, Math.floor((top + height - head) / line));
    const gap = wide >= 8 ? 1 : 0;
    context.textAlign = "center";
    for (let r = firstRow; r <= lastRow; r++) {
      for (let c = firstColumn; c <= lastColumn; c++) {
        const x = labels + c * wide - left, y = head + r * line - top;
        const cell = spec.cell(r, c);
        let ink = theme.soft, text = cell ? cell.text : "·";
        if (cell && cell.none) {
          context.fillStyle = hatch(context);
          context.fillRect(x, y, wide - gap, line - 1);
          text = "";
        } else if (cell && cell.value > 0) {
          const rgb = shade(spec.shade(cell.value));
          context.fillStyle = css(rgb);
          context.fillRect(x, y, Math.max(1, wide - gap + (gap ? 0 : 0.5)), line - 1);
          ink = textOn(rgb);
        } else if (cell) {
          context.fillStyle = theme.faint;
          context.fillRect(x, y, wide - gap + (gap ? 0 : 0.5), line - 1);
        }
        if (text && context.measureText(text).width <= wide - 3) {
          context.fillStyle = ink;
          context.fillText(text, x + wide / 2, y + line / 2);
        }
      }
    }
    if (!spec.edge) {
      context.fillStyle = theme.bg; // headings lie over what is scrolled below them
      context.fillRect(0, 0, width, head);
      context.fillRect(0, 0, labels, height);
      context.fillStyle = theme.ink;
      let free = labels - 4;
      for (let c = firstColumn; c <= lastColumn; c++) {
        const text = String(spec.columns[c]), half = context.measureText(text).width / 2;
        const x = labels + (c + 0.5) * wide - left;
        if (x - half < free || x + half > width) continue;
        context.fillText(text, x, head / 2);
        free = x + half + 5;
      }
      context.textAlign = "right";
      context.fillStyle = theme.bg;
      context.fillRect(0, 0, labels, head);
      context.fillStyle = theme.soft;
      context.fillText(spec.axis, labels - 6, head / 2);
      context.fillStyle = theme.ink;
      context.save();
      context.beginPath();
      context.rect(0, head, width, height - head);
      context.clip();
      for (let r = firstRow; r <= lastRow; r++) {
        context.fillText(shorten(context, spec.rows[r], labels - 10), labels - 6, head + (r + 0.5) * line - top);
      }
      context.restore();
    }
    if (at) {
      const [r, c] = at, x = labels + c * wide - left, y = head + r * line - top;
      for (const [colour, thick] of [[theme.bg, 5], [theme.ink, 2.5]]) {
        context.strokeStyle = colour;
        context.lineWidth = thick;
        context.strokeRect(Math.max(1.5, x - 1), Math.max(1, y - 0.5), Math.max(wide, 3), line - 1);
      }
    }
  }

  function move(r, c, reveal) {
    at = [r, c];
    readout.textContent = spec.say(r, c);
    if (reveal) {
      const x = c * wide, y = r * line;
      const width = scroller.clientWidth - labels, height = scroller.clientHeight - head;
      if (x < scroller.scrollLeft) scroller.scrollLeft = x;
      else if (x + wide + 2 > scroller.scrollLeft + width) scroller.scrollLeft = x + wide + 2 - width;
      if (y < scroller.scrollTop) scroller.scrollTop = y;
      else if (y + line + 2 > scroller.scrollTop + height) scroller.scrollTop = y + line + 2 - height;
    }
    paint();
  }

  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left - labels, y = event.clientY - box.top - head;
    const c = Math.floor((x + scroller.scrollLeft) / wide), r = Math.floor((y + scroller.scrollTop) / line);
    const inside = x >= 0 && y >= 0 && r >= 0 && r < spec.rows.length && c >= 0 && c < spec.columns.length;
    return inside ? [r, c] : null;
  }

  scroller.addEventListener("scroll", paint);
  canvas.addEventListener("pointermove", (event) => {
    const found = cellAt(event);
    if (found && (!at || found[0] !== at[0] || found[1] !== at[1])) move(found[0], found[1], false);
  });
  canvas.addEventListener("click", (event) => {
    const found = cellAt(event);
    if (!found) return;
    move(found[0], found[1], false);
    if (spec.open) spec.open(found[0], found[1]);
  });
  scroller.addEventListener("focus", () => { if (!at) move(spec.start[0], spec.start[1], true); });
  scroller.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [r, c] = at || spec.start, rows = spec.rows.length - 1, columns = spec.columns.length - 1;
    const to = {
      ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1], ArrowUp: [r - 1, c], ArrowDown: [r + 1, c],
      Home: [r, 0], End: [r, columns], PageUp: [r - 10, c], PageDown: [r + 10, c],
    }[event.key];
    if (to) {
      event.preventDefault();
      move(Math.min(rows, Math.max(0, to[0])), Math.min(columns, Math.max(0, to[1])), true);
    } else if (event.key === "Enter" && spec.open) {
      event.preventDefault();
      spec.open(r, c);
    }
  });
  painters.push(layout);
  return { elements: [scroller, readout], layout };
}

// ---- Details of one pair ----------------------------------------------------------------------

const WORST = new Map((D.details || []).map((detail, k) => [detail.row, k]));
const TITLES = {
  label: "tap", rel_diff: "rel diff", max_abs: "max abs", mean_abs: "mean abs", max_ulp: "max ULP",
  p50: "abs, 50%", p99: "abs, 99%", p999: "abs, 99.9%", nan: "NaN on one side", inf: "Inf on one side",
  times_floor: "times floor", ranks_differ: "ranks that differ", where: "largest at", numel: "elements",
};
const WHOLE = new Set([
  "step", "rank", "occurrence", "layer", "numel", "changed", "mismatched", "nan", "inf", "max_ulp",
]);
const titleOf = (key) => TITLES[key] || key.replace(/_/g, " ");
const dialog = byId("details");

function shown(key, i) {
  const value = column(key)[i];
  if (key === "ranks_differ") return value && value.length ? ranges(value) : "–";
  if (value === null || value === undefined || value === "") return "–";
  if (key === "outcome") return `${WORDS[value] || value}: ${MEANINGS[value] || ""}`;
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (WHOLE.has(key)) return whole(value);
  if (typeof value === "number" || value === "inf" || value === "-inf") return figure(value);
  return String(value);
}

function openDetails(i) {
  const list = make("dl");
  for (const key of Object.keys(D.rows)) {
    list.append(make("dt", {}, titleOf(key)), make("dd", {}, shown(key, i)));
  }
  const go = (to) => (event) => {
    const text = event.currentTarget.textContent;
    openDetails(to);
    const again = [...dialog.querySelectorAll("button")].find((button) => button.textContent === text);
    if (again && !again.disabled) again.focus(); // so that pressing it again goes on
  };
  const bar = make("div", { class: "row" },
    make("button", { type: "button", onclick: () => dialog.close(), autofocus: true }, "Close"),
    make("button", { type: "button", onclick: go(i - 1), disabled: i === 0 }, "Previous in order"),
    make("button", { type: "button", onclick: go(i + 1), disabled: i === COUNT - 1 }, "Next in order"),
  );
  if (WORST.has(i)) {
    bar.append(make("button", { type: "button", onclick: () => {
      dialog.close();
      const article = byId(`worst-${WORST.get(i)}`);
      article.scrollIntoView();
      article.focus();
    } }, "Its positions and values"));
  }
  bar.append(make("button", { type: "button", onclick: () => {
    dialog.close();
    table.find(LABEL[i]);
  } }, "This tap in the table"));
  dialog.replaceChildren(
    make("h2", { id: "details-title" }, String(LABEL[i])),
    make("p", { class: "soft" },
      `Number ${thousands(i + 1)} of ${thousands(COUNT)} in execution order; ${place(i)}.`),
    bar, list,
  );
  if (!dialog.open) dialog.showModal();
  else bar.firstChild.focus();
}
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

// ---- Head -------------------------------------------------------------------------------------

function verdict() {
  const n = Object.fromEntries(Object.keys(WORDS).map((key) => [key, D.counts[key] || 0]));
  const compared = n.equal + n.close + n.differs + n.unmeasured + n.shape;
  const pairs = compared + n.error, alone = n.only_a + n.only_b;
  const first = FIRST.tolerance;
  const parts = [];
  if (!pairs && !alone) return "There is nothing to compare: neither side has a tap.";
  if (n.differs || n.shape || n.unmeasured) {
    const how = [
      [n.differs, "beyond tolerance"], [n.shape, "in shape"], [n.unmeasured, "by an unknown amount"],
    ].filter(([m]) => m);
    const all = how.reduce((sum, [m]) => sum + m, 0), mixed = how.length > 1;
    const split = how.map(([m, words]) => `${thousands(m)} ${words}`).join(", ");
    parts.push(`B differs from A ${mixed ? "" : `${how[0][1]} `}in ${thousands(all)} of ${some(pairs, "pair")}`
      + (mixed ? ` (${split})` : "")
      + (first === null ? "" : `, first at ${LABEL[first]} (${place(first)})`));
  } else if (compared) {
    const all = n.error ? `all ${some(compared, "pair")} that could be compared`
      : compared === 1 ? "the one pair" : `all ${some(compared, "pair")}`;
    parts.push(n.close
      ? `B agrees with A within tolerance in ${all}, ${thousands(n.equal)} of them bit for bit`
      : `B equals A bit for bit in ${all}`);
  } else if (pairs) {
    parts.push(pairs === 1 ? "The one pair could not be compared"
      : `None of the ${thousands(pairs)} pairs could be compared`);
  } else parts.push("No tap is on both sides");
  if (n.error && compared) parts.push(`${thousands(n.error)} could not be compared`);
  if (alone) parts.push(`${some(alone, "tap is", "taps are")} on one side only`);
  return `${parts.join("; ")}.`;
}

function buildHead() {
  const title = `B, ${D.b.path}, against A, ${D.a.path}`;
  document.title = `graft diff: ${title}`;
  byId("title").textContent = title;
  byId("verdict").textContent = verdict();
  const { bitwise, tolerance } = FIRST;
  const jumps = [
    ["first divergence bitwise", bitwise, "first that is not bit for bit equal"],
    ["first divergence beyond", tolerance, "first beyond tolerance"],
  ].filter(([, i], k) => i !== null && !(k && i === bitwise));
  if (bitwise !== null && bitwise === tolerance) jumps[0][2] = "first divergence";
  const button = ([, i, what]) => make("button", { type: "button", title: `All figures of ${LABEL[i]}, ${place(i)}`,
    onclick: () => openDetails(i) }, `Details of the ${what}`);
  const left = new Set(jumps);
  for (const line of D.lines) {
    const words = line.trimStart().toLowerCase(), first = words.startsWith("first divergence");
    const jump = jumps.find(([start]) => words.startsWith(start));
    byId("lines").append(make("p", { class: first ? "line first" : "line" }, line, jump ? " " : null,
      jump ? button(jump) : null));
    left.delete(jump);
  }
  for (const jump of left) byId("lines").append(make("p", { class: "line" }, button(jump)));
  for (const key of [
    "equal", "close", "differs", "unmeasured", "shape", "only_a", "only_b", "error", "reordered",
  ]) {
    const n = D.counts[key] || 0;
    if (!n) continue;
    byId("counts").append(make("li", { title: MEANINGS[key] }, make("b", {}, thousands(n)), ` ${WORDS[key]}`));
  }
  for (const [letter, role, side] of [["A", "baseline", D.a], ["B", "target", D.b]]) {
    byId("sides").append(make("div", { class: "side" },
      make("p", {}, make("b", {}, `${letter}, the ${role}: `), make("span", { class: "mono" }, side.path)),
      make("p", { class: "soft" }, `${some(side.ranks, "rank")}, ${some(side.records, "record")}`),
      side.command ? make("p", { class: "mono" }, side.command) : null,
    ));
  }
  const facts = byId("facts");
  if (D.rules.length) {
    facts.append(make("p", {}, make("b", {}, "How it was judged")),
      make("ul", {}, ...D.rules.map((rule) => make("li", {}, rule))));
  }
  facts.append(make("p", {}, make("b", {}, "Noise floor: "), D.floor.length
    ? `taken from ${D.floor.join(", ")}` : "none was given, so differences are not set against run to run noise."));
  if (D.left_out) {
    facts.append(make("p", {}, make("b", {}, `${some(D.left_out, "pair")} left out: `),
      "they did not fit on this page. Equal ones go first. ",
      "The counts above include them; the charts and the table do not."));
  }
  facts.append(make("p", { class: "soft" }, `Written by tensorgraft ${D.version}.`));
}

// ---- The measure that both charts show ----------------------------------------------------------

const offered = Object.keys(MEASURES).filter((key) =>
  key === "rel_diff" || column(key).some((value) => number(value) !== null));
let chosen = "rel_diff";
const followers = [];

function measureSelect() {
  const select = make("select", { title: "What the chart's heights and the map's colours show", onchange: () => {
    chosen = select.value;
    for (const follow of followers) follow();
  } }, ...offered.map((key) => make("option", { value: key }, MEASURES[key])));
  followers.unshift(() => { select.value = chosen; });
  return make("label", {}, "Measure: ", select);
}

// ---- Divergence over execution order ------------------------------------------------------------

function buildOrder() {
  const section = byId("order");
  if (!COUNT) return say("order", "There are no pairs to draw.");

  // Series: the names that differ most have a marker each, the rest share one.
  const LIMIT = MARKERS.length;
  const worst = new Map(), relative = measure("rel_diff");
  for (let i = 0; i < COUNT; i++) {
    const severe = OUTCOME[i] === "differs" || OUTCOME[i] === "error" || OUTCOME[i] === "shape";
    const size = relative[i] ?? (severe ? Infinity : 1e-300);
    worst.set(SERIES[i], Math.max(worst.get(SERIES[i]) ?? -1, size));
  }
  const names = [...worst.keys()];
  const kept = names.length <= LIMIT ? names
    : names.map((name, k) => [worst.get(name), -k, name])
      .sort((x, y) => (y[0] > x[0]) - (y[0] < x[0]) || y[1] - x[1])
      .slice(0, LIMIT).sort((x, y) => y[1] - x[1]).map((entry) => entry[2]);
  const series = kept.map((name, k) => ({ name, marker: MARKERS[k], on: true }));
  const others = names.length - kept.length;
  if (others) series.push({ name: some(others, "other name"), marker: OTHERS, on: true });
  const numberOf = new Map(kept.map((name, k) => [name, k]));
  const member = SERIES.map((name) => numberOf.get(name) ?? kept.length);

  const base = make("canvas"), over = make("canvas");
  const readout = make("p", { class: "readout", "aria-live": "polite", id: "order-readout" },
    "Point at a mark, or focus the chart and use the arrow keys.");
  const chart = make("div", { class: "chart", id: "order-chart", tabindex: 0, role: "application",
    "aria-label": "Chart of each pair's difference over execution order. Left and right go to the next pair, "
      + "up and down to the next that is not equal, Enter opens its details." }, base, over);
  const legend = make("div", { class: "legend", role: "group", "aria-label": "Names shown in the chart" });
  const note = make("p", { class: "soft" });
  section.append(
    make("div", { class: "row" }, measureSelect(), make("span", { class: "hint" },
      "← → next pair, ↑ ↓ next that is not equal, Enter for its details.")),
    note, legend, chart, readout,
  );

  const xs = new Float32Array(COUNT), ys = new Float32Array(COUNT);
  let at = null;
  const visible = (i) => series[member[i]].on;

  function buildLegend() {
    legend.replaceChildren(...series.map((one) => make("button", { type: "button", "aria-pressed": String(one.on),
      title: `Show or hide ${one.name} in the chart`,
      onclick: (event) => {
        one.on = !one.on;
        event.currentTarget.setAttribute("aria-pressed", String(one.on));
        paint();
      } }, icon(one.marker), make("span", {}, bothEnds(one.name, 36)))));
    if (series.length > 1) {
      for (const [text, on] of [["Show all", true], ["Hide all", false]]) {
        legend.append(make("button", { type: "button", title: `${text} names in the chart`, onclick: () => {
          for (const one of series) one.on = on;
          buildLegend();
          paint();
          [...legend.children].find((button) => button.textContent === text).focus();
        } }, text));
      }
    }
  }

  function sprite(marker, radius) {
    const canvas = document.createElement("canvas"), size = Math.ceil(radius * 1.3 + 2) * 2;
    const context = pixels(canvas, size, size);
    context.translate(size / 2, size / 2);
    context.scale(radius, radius);
    const path = new Path2D(marker.path);
    context.strokeStyle = context.fillStyle = colourOf(marker);
    context.lineWidth = 1.6 / radius;
    if (marker.fill) context.fill(path);
    context.stroke(path);
    return { canvas, size };
  }

  function paint() {
    const figures = measure(chosen);
    const width = chart.clientWidth, narrow = width < 560;
    const scale = logScale(figures);
    const infinite = figures.some((x) => x === Infinity), unknown = figures.some((x) => x === null);
    const left = 68, right = width - 10;
    let y = 6;
    const marks = [
      ["bitwise", "first not bit for bit equal", theme.soft, [5, 4]],
      ["tolerance", "first beyond tolerance", theme.first, []],
    ].filter(([key]) => FIRST[key] !== null);
    const together = marks.length === 2 && FIRST.bitwise === FIRST.tolerance;
    if (together) { marks.shift(); marks[0][1] = "first divergence, beyond tolerance"; }
    const markTop = y;
    y += marks.length * 17;
    const unknownY = unknown ? (y += 16) - 5 : null;
    const infiniteY = infinite ? (y += 18) - 5 : null;
    const top = y + (unknown || infinite ? 14 : 6);
    const bottom = top + (scale ? (narrow ? 210 : 280) : 40);
    const equalY = bottom + 18, axisY = equalY + 12;
    const height = axisY + 40;
    const context = pixels(base, width, height);
    context.lineWidth = 1;

    // Axes: decades, the lines above and below them, the steps.
    const horizontal = (level, text, colour, dash) => {
      context.strokeStyle = colour;
      context.setLineDash(dash || []);
      context.beginPath();
      context.moveTo(left, Math.round(level) + 0.5);
      context.lineTo(right, Math.round(level) + 0.5);
      context.stroke();
      context.setLineDash([]);
      context.textAlign = "right";
      context.fillStyle = theme.soft;
      context.fillText(text, left - 8, level);
    };
    const yOf = (x) => bottom - scale.at(x) * (bottom - top);
    if (scale) {
      const every = Math.max(1, Math.ceil((scale.to - scale.from) / ((bottom - top) / 24)));
      for (let e = scale.from; e <= scale.to; e += every) {
        horizontal(bottom - ((e - scale.from) / (scale.to - scale.from)) * (bottom - top), power(e), theme.faint);
      }
      if (chosen === "times_floor" && scale.from < 0 && scale.to > 0) {
        horizontal(yOf(1), "floor", theme.soft, [2, 3]);
      }
    } else {
      context.textAlign = "center";
      context.fillStyle = theme.soft;
      context.fillText("No pair has a figure above 0.", (left + right) / 2, (top + bottom) / 2);
    }
    horizontal(equalY, "equal", theme.line);
    if (unknown) horizontal(unknownY, "no figure", theme.line, [3, 3]);
    if (infinite) horizontal(infiniteY, "inf", theme.line, [3, 3]);
    const xOf = (i) => left + 6 + ((i + 0.5) / COUNT) * (right - left - 12);
    const starts = [0];
    for (let i = 1; i < COUNT; i++) if (STEP[i] !== STEP[i - 1]) starts.push(i);
    const each = (right - left) / starts.length;
    let free = left;
    starts.forEach((start, k) => {
      const from = k ? xOf(start - 0.5) : left, to = k + 1 < starts.length ? xOf(starts[k + 1] - 0.5) : right;
      if (k && each > 5) {
        context.strokeStyle = theme.line;
        context.beginPath();
        context.moveTo(Math.round(from) + 0.5, markTop + marks.length * 17);
        context.lineTo(Math.round(from) + 0.5, axisY + 8);
        context.stroke();
      }
      const text = to - from > 48 ? `step ${STEP[start]}` : String(STEP[start]);
      const half = context.measureText(text).width / 2;
      const middle = Math.max((from + to) / 2, left + half);
      if (middle - half > free && middle + half <= width) {
        context.textAlign = "center";
        context.fillStyle = theme.ink;
        context.fillText(text, middle, axisY + 9);
        free = middle + half + 6;
      }
    });
    context.textAlign = "center";
    context.fillStyle = theme.soft;
    context.fillText(`execution order of A, ${some(COUNT, "pair")}`, (left + right) / 2, axisY + 28);

    // Points: equal ones lie below the others, and names without a marker below those with one.
    const many = COUNT > 1500, radius = COUNT > 6000 ? 3.2 : many || narrow ? 3.6 : 4.6;
    const small = series.map((one) => sprite(one.marker, many ? 2.4 : radius));
    const large = series.map((one) => sprite(one.marker, many && one.marker === OTHERS ? radius * 0.7 : radius));
    const lacking = figures.reduce((sum, x) => sum + (x === null), 0);
    for (const pass of [0, 1, 2]) {
      const equal = pass === 0;
      context.globalAlpha = many && pass === 1 ? 0.5 : 1;
      for (let i = 0; i < COUNT; i++) {
        const x = figures[i];
        if ((x === 0 ? 0 : member[i] === kept.length ? 1 : 2) !== pass) continue;
        xs[i] = xOf(i);
        ys[i] = x === null ? unknownY : x === Infinity ? infiniteY : x === 0 ? equalY : yOf(x);
        if (!visible(i)) continue;
        const { canvas, size } = (equal ? small : large)[member[i]];
        context.drawImage(canvas, xs[i] - size / 2, ys[i] - size / 2, size, size);
      }
    }
    note.textContent = lacking
      ? `${some(lacking, "pair has", "pairs have")} no ${MEASURES[chosen]} and ${lacking === 1 ? "stands" : "stand"}`
        + " on the line “no figure”: on one side only, of another shape, in error, or not finite."
      : "";
    note.hidden = !lacking;

    context.globalAlpha = 1;

    // The first divergences.
    marks.forEach(([key, text, colour, dash], k) => {
      const x = Math.round(xOf(FIRST[key])) + 0.5, labelY = markTop + 7 + k * 17;
      context.strokeStyle = context.fillStyle = colour;
      context.lineWidth = 1.5;
      context.setLineDash(dash);
      context.beginPath();
      context.moveTo(x, labelY - 7);
      context.lineTo(x, axisY);
      context.stroke();
      context.setLineDash([]);
      const wide = context.measureText(text).width;
      const before = x + 6 + wide > width;
      const start = before ? Math.max(2, x - 6 - wide) : x + 6;
      context.fillStyle = theme.bg;
      context.fillRect(start - 2, labelY - 8, wide + 4, 15);
      context.fillStyle = colour;
      context.textAlign = "left";
      context.fillText(text, start, labelY);
    });
    pixels(over, width, height);
    ring();
  }

  function ring() {
    const context = over.getContext("2d");
    context.clearRect(0, 0, over.width, over.height);
    if (at === null || !visible(at)) return;
    context.lineWidth = 2.5;
    context.strokeStyle = theme.ink;
    context.beginPath();
    context.arc(xs[at], ys[at], 9, 0, 7);
    context.stroke();
  }

  function move(i) {
    at = i;
    readout.textContent = `${thousands(i + 1)}. ${describe(i)}`;
    ring();
  }

  function seek(from, by, wanted) {
    for (let i = from; i >= 0 && i < COUNT; i += by) if (visible(i) && wanted(i)) return i;
    return null;
  }
  const any = () => true, apart = (i) => OUTCOME[i] !== "equal";

  function nearest(event) {
    const box = base.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let found = null, least = 26 * 26;
    for (let i = 0; i < COUNT; i++) {
      const d = (xs[i] - x) ** 2 + (ys[i] - y) ** 2;
      if (d < least && visible(i)) { least = d; found = i; }
    }
    return found;
  }

  chart.addEventListener("pointermove", (event) => {
    const found = nearest(event);
    if (found !== null && found !== at) move(found);
    chart.style.cursor = found === null ? "" : "pointer";
  });
  chart.addEventListener("click", (event) => {
    const found = nearest(event);
    if (found !== null) { move(found); openDetails(found); }
  });
  chart.addEventListener("focus", () => {
    if (at !== null && visible(at)) return;
    const start = [FIRST.tolerance, FIRST.bitwise].find((i) => i !== null && visible(i)) ?? seek(0, 1, any);
    if (start !== null) move(start);
  });
  chart.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const here = at ?? -1;
    const steps = {
      ArrowRight: () => seek(here + 1, 1, any), ArrowLeft: () => seek(here - 1, -1, any),
      ArrowUp: () => seek(here + 1, 1, apart), ArrowDown: () => seek(here - 1, -1, apart),
      Home: () => seek(0, 1, any), End: () => seek(COUNT - 1, -1, any),
    };
    if (event.key in steps) {
      event.preventDefault();
      const found = steps[event.key]();
      if (found !== null) move(found);
    } else if (event.key === "Enter" && at !== null && visible(at)) {
      event.preventDefault();
      openDetails(at);
    }
  });
  painters.push(() => { buildLegend(); paint(); });
  followers.push(paint);
}

// ---- Layer by name ------------------------------------------------------------------------------

function buildLayers() {
  const section = byId("layers");
  if (!COUNT) return say("layers", "There are no pairs to draw.");
  const layers = [...new Set(LAYER.filter((layer) => layer !== null))].sort((x, y) => x - y);
  if (!layers.length) return leaveOut("layers");
  const columnOf = new Map(layers.map((layer, c) => [layer, c]));
  const names = [...new Set(SERIES.filter((_, i) => LAYER[i] !== null))];
  const rowOf = new Map(names.map((name, r) => [name, r]));
  const without = LAYER.filter((layer) => layer === null).length;
  const holder = make("div");
  section.append(
    make("div", { class: "row" }, measureSelect(), make("span", { class: "hint" },
      "Arrow keys go from cell to cell, Enter opens the worst pair of a cell.")),
    make("p", { class: "soft" },
      "Each cell is the worst over all steps, ranks and occurrences. Its number is the power of ten."
      + (without ? ` ${some(without, "pair has", "pairs have")} no layer and ${without === 1 ? "is" : "are"} not in it.`
        : "")),
    holder,
  );

  function build() {
    const figures = measure(chosen), cells = new Map();
    for (let i = 0; i < COUNT; i++) {
      if (LAYER[i] === null) continue;
      const key = rowOf.get(SERIES[i]) * layers.length + columnOf.get(LAYER[i]);
      const cell = cells.get(key) || { value: null, none: true, worst: i, pairs: 0, lacking: 0, score: -2 };
      const severe = figures[i] === null && BAD.has(OUTCOME[i]) && OUTCOME[i] !== "unmeasured";
      const score = severe ? Infinity : figures[i] ?? -1;
      if (score > cell.score) { cell.worst = i; cell.score = score; }
      if (figures[i] === null) cell.lacking++;
      else { cell.none = false; cell.value = Math.max(cell.value ?? 0, figures[i]); }
      cell.pairs++;
      cells.set(key, cell);
    }
    let start = 0, most = -2;
    for (const [key, cell] of cells) {
      if (cell.none) cell.text = "";
      else if (cell.value === 0) cell.text = "=";
      else cell.text = cell.value === Infinity ? "inf" : String(Math.floor(Math.log10(cell.value) + 1e-9));
      if (cell.lacking && !cell.none) cell.text += "!";
      if (cell.score > most) { most = cell.score; start = key; }
    }
    const cellAt = (r, c) => cells.get(r * layers.length + c);
    const scale = logScale([...cells.values()].map((cell) => cell.value));
    const map = grid({
      rows: names, columns: layers, axis: "layer", cellWidth: [5, 40], cell: cellAt,
      shade: (x) => scale ? scale.at(x) : 1,
      start: [Math.floor(start / layers.length), start % layers.length],
      label: `Map of names by layers, worst ${MEASURES[chosen]}. `
        + "Arrow keys go from cell to cell, Enter opens its worst pair.",
      hint: "Point at a cell, or focus the map and use the arrow keys.",
      say: (r, c) => {
        const cell = cellAt(r, c), where = `${names[r]}, layer ${layers[c]}`;
        if (!cell) return `${where}: not tapped`;
        const lacking = cell.lacking ? `, ${thousands(cell.lacking)} without a figure` : "";
        const what = cell.none ? "no figure" : cell.value === 0 ? "equal"
          : `worst ${MEASURES[chosen]} ${figure(cell.value)}`;
        return `${where}: ${what} of ${some(cell.pairs, "pair")}${lacking}. Worst: ${describe(cell.worst)}`;
      },
      open: (r, c) => { const cell = cellAt(r, c); if (cell) openDetails(cell.worst); },
    });
    const keys = ["= equal", "· not tapped"], all = [...cells.values()];
    if (all.some((cell) => cell.none)) {
      keys.push("hatched: no figure (on one side only, other shape, error, not finite)");
    }
    if (all.some((cell) => cell.lacking && !cell.none)) keys.push("!: some pair there has no figure");
    holder.replaceChildren(scaleLegend(scale, MEASURES[chosen], keys), ...map.elements);
  }
  const held = painters.length;
  build();
  const owned = painters.splice(held);
  painters.push(() => owned.forEach((paint) => paint()));
  followers.push(() => {
    const before = painters.length;
    build();
    owned.splice(0, owned.length, ...painters.splice(before));
    owned.forEach((paint) => paint());
  });
}

// ---- Ranks that differ --------------------------------------------------------------------------

function buildRanks() {
  const section = byId("ranks");
  if (!COUNT) return say("ranks", "There are no pairs to count.");
  let highest = -1;
  for (let i = 0; i < COUNT; i++) for (const rank of ranksOf(i)) highest = Math.max(highest, rank);
  if (highest < 0) {
    return say("ranks", OUTCOME.some((outcome) => outcome !== "equal")
      ? "The pairs do not tell which rank they are from." : "No rank differs.");
  }
  const total = Math.max(highest + 1, D.b.ranks || 0, 1);
  if (total === 1) return leaveOut("ranks");
  const beyond = OUTCOME.some((outcome) => APART.has(outcome));
  const close = !beyond && OUTCOME.includes("close");
  const take = (i) => (beyond ? APART.has(OUTCOME[i]) : OUTCOME[i] === "close");
  const cells = new Map(), sums = new Map(), totals = new Map();
  for (let i = 0; i < COUNT; i++) {
    if (!take(i)) continue;
    for (const rank of new Set(ranksOf(i))) {
      const key = `${rank}|${SERIES[i]}`, cell = cells.get(key) || { value: 0, first: i };
      cell.value++;
      cells.set(key, cell);
      sums.set(SERIES[i], (sums.get(SERIES[i]) || 0) + 1);
      const all = totals.get(rank) || { value: 0, first: i };
      all.value++;
      totals.set(rank, all);
    }
  }
  const apart = [...totals.keys()].sort((x, y) => x - y);
  const within = close ? " within tolerance" : "";
  let text;
  if (!apart.length) {
    text = OUTCOME.every((outcome) => outcome === "equal") ? "No rank differs: all pairs are equal."
      : "No rank differs in a pair that could be compared.";
  } else if (apart.length === total) text = `All ${thousands(total)} ranks differ${within}.`;
  else if (apart.length === 1) text = `Only rank ${apart[0]} of ${thousands(total)} differs${within}.`;
  else text = `${thousands(apart.length)} of ${thousands(total)} ranks differ${within}: ${fewRanges(apart, 200)}.`;
  section.append(make("p", {}, make("b", { id: "ranks-said" }, text)));
  if (!apart.length) return;
  const shownRanks = total <= 64 ? Array.from({ length: total }, (_, rank) => rank) : apart;
  const names = [...new Set(SERIES.filter((name) => sums.has(name)))];
  const rows = names.length > 1 ? ["all names", ...names] : names;
  for (const cell of [...cells.values(), ...totals.values()]) cell.text = thousands(cell.value);
  const cellAt = (r, c) => (rows.length > 1 && r === 0 ? totals.get(shownRanks[c])
    : cells.get(`${shownRanks[c]}|${rows[r]}`));
  let most = 0;
  for (const cell of cells.values()) most = Math.max(most, cell.value);
  const worst = apart.reduce((one, other) => (totals.get(other).value > totals.get(one).value ? other : one));
  const map = grid({
    rows, columns: shownRanks, axis: "rank", cellWidth: [total <= 64 ? 14 : 8, 40], cell: cellAt,
    start: [0, shownRanks.indexOf(worst)],
    shade: (n) => Math.min(1, 0.2 + 0.8 * (most > 1 ? (n - 1) / (most - 1) : n - 0.5)),
    label: "Map of names by ranks, counts of pairs that differ. "
      + "Arrow keys go from cell to cell, Enter opens the first such pair.",
    hint: "Point at a cell, or focus the map and use the arrow keys.",
    say: (r, c) => {
      const cell = cellAt(r, c);
      const where = `${rows[r]}, rank ${shownRanks[c]}`;
      if (!cell) return `${where}: no pair differs`;
      return `${where}: part in ${some(cell.value, "pair that differs", "pairs that differ")}${within}. `
        + `First: ${describe(cell.first)}`;
    },
    open: (r, c) => { const cell = cellAt(r, c); if (cell) openDetails(cell.first); },
  });
  section.append(
    make("p", { class: "soft" }, `How many pairs that differ${within || " beyond tolerance"} each rank has part in`
      + (total > 64 && apart.length < total ? "; ranks that do not differ are left out." : ". · means none.")),
    make("p", { class: "hint" }, "Arrow keys go from cell to cell, Enter opens the first such pair."),
    ...map.elements,
  );
}

// ---- Table --------------------------------------------------------------------------------------

const table = (() => {
  const PAGE = 50;
  const has = (key, wanted) => column(key).some(wanted);
  const figureKnown = (value) => number(value) !== null;
  const positive = (value) => typeof value === "number" && value > 0;
  const order = (key) => (i) => { const x = number(column(key)[i]); return x === null ? null : x; };
  const columns = [
    { key: "order", title: "#", n: true, value: (i) => i, text: (i) => thousands(i + 1), up: true },
    { key: "label", title: "tap", value: (i) => String(LABEL[i]), up: true },
    { key: "outcome", title: "outcome", value: (i) => -RANKING[i],
      text: (i) => `${SIGNS[OUTCOME[i]] || ""} ${WORDS[OUTCOME[i]] || OUTCOME[i]}`
        + (REORDERED[i] ? ", reordered" : "") + (GRAFTED[i] ? ", then grafted" : "") },
    { key: "rel_diff", title: "rel diff", n: true },
    { key: "max_abs", title: "max abs", n: true },
    { key: "times_floor", title: "× floor", n: true, when: () => has("times_floor", figureKnown) },
    { key: "step", title: "step", n: true, value: order("step"), text: (i) => shown("step", i), up: true },
    { key: "rank", title: "rank", n: true,
      when: () => has("rank", figureKnown) || has("ranks_differ", (list) => list && list.length),
      value: (i) => ranksOf(i)[0] ?? null, text: (i) => fewRanges(ranksOf(i), 12) || "–", up: true },
    { key: "occurrence", title: "occ.", n: true, when: () => has("occurrence", positive), up: true },
    { key: "kind", title: "kind", when: () => has("kind", (kind) => kind && kind !== "tensor"),
      value: (i) => String(KIND[i]), up: true },
    { key: "changed", title: "changed", n: true, when: () => has("changed", figureKnown) },
    { key: "nan", title: "NaN", n: true, when: () => has("nan", positive) },
    { key: "inf", title: "Inf", n: true, when: () => has("inf", positive) },
    { key: "dtype", title: "dtype", when: () => has("dtype", Boolean),
      value: (i) => String(column("dtype")[i] ?? ""), up: true },
    { key: "shape", title: "shape", when: () => has("shape", Boolean),
      value: (i) => String(column("shape")[i] ?? ""), up: true },
    { key: "note", title: "largest at, or message",
      when: () => has("where", Boolean) || has("message", Boolean),
      value: (i) => MESSAGE[i] || WHERE[i] || null, text: (i) => MESSAGE[i] || WHERE[i] || "–", up: true },
  ].filter((one) => !one.when || one.when());
  for (const one of columns) {
    one.value = one.value || order(one.key);
    one.text = one.text || ((i) => shown(one.key, i));
  }

  const byWorst = (x, y) => RANKING[x] - RANKING[y];
  const texts = LABEL.map((label, i) => [
    label, WORDS[OUTCOME[i]], OUTCOME[i], MESSAGE[i] || "", REORDERED[i] ? "reordered" : "",
  ].join(" ").toLowerCase());

  let sort = { key: "outcome", up: false }, page = 0, found = [];
  const wanted = new Set(OUTCOMES);
  let body, status, previous, next, heads, search, boxes;

  function refresh(first) {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = [];
    for (let i = 0; i < COUNT; i++) {
      if (wanted.has(OUTCOME[i]) && words.every((word) => texts[i].includes(word))) found.push(i);
    }
    const { key, up } = sort;
    if (key === "outcome") {
      found.sort(up ? (x, y) => byWorst(y, x) : byWorst);
    } else {
      const one = columns.find((each) => each.key === key);
      const values = new Map(found.map((i) => [i, one.value(i)]));
      found.sort((x, y) => {
        const a = values.get(x), b = values.get(y);
        if (a === null || b === null) return (a === null) - (b === null) || x - y; // unknown ones last
        const less = a < b ? -1 : a > b ? 1 : 0;
        return (up ? less : -less) || x - y;
      });
    }
    page = first ? 0 : page;
    show();
  }

  function show() {
    for (const [key, head] of heads) {
      if (key === sort.key) head.setAttribute("aria-sort", sort.up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
      head.querySelector("span").textContent = key === sort.key ? (sort.up ? " ▲" : " ▼") : "";
    }
    const part = found.slice(page * PAGE, (page + 1) * PAGE);
    body.replaceChildren(...part.map((i, k) => make("tr", { "data-row": i, onclick: () => openDetails(i) },
      ...columns.map((one) => {
        const text = one.text(i);
        if (one.key === "label") {
          return make("td", {}, make("button",
            { type: "button", tabindex: k ? -1 : 0, title: `All figures of ${text}` }, bothEnds(text, 48)));
        }
        const bad = one.key === "outcome" && BAD.has(OUTCOME[i]);
        const long = one.key === "note" || one.key === "shape" || one.key === "rank";
        return make("td", { class: one.n ? "n" : bad ? "bad" : "" },
          long ? make("span", { class: "clip", title: text.length > 30 ? text : null }, text) : text);
      }))));
    if (!part.length) {
      body.append(make("tr", {}, make("td", { colspan: columns.length }, "No pair fits the search.")));
    }
    const from = page * PAGE;
    status.textContent = found.length
      ? `${thousands(from + 1)}-${thousands(from + part.length)} of ${some(found.length, "pair")}`
        + (found.length < COUNT ? `, ${thousands(COUNT)} in all` : "")
      : `0 of ${some(COUNT, "pair")}`;
    previous.disabled = page === 0;
    next.disabled = from + PAGE >= found.length;
  }

  function turn(by) {
    page += by;
    show();
    byId("rows").scrollLeft = 0;
  }

  function sortBy(one) {
    sort = sort.key === one.key ? { key: one.key, up: !sort.up } : { key: one.key, up: Boolean(one.up) };
    refresh(true);
  }

  function build() {
    const section = byId("table");
    if (!COUNT) return say("table", "There are no pairs to list.");
    search = make("input",
      { type: "search", id: "search", placeholder: "attn layer=3", oninput: () => refresh(true) });
    boxes = OUTCOMES.filter((key) => OUTCOME.includes(key)).map((key) => make("input", {
      type: "checkbox", value: key, checked: true, title: `Show or hide pairs: ${MEANINGS[key]}`, onchange: (event) => {
        if (event.target.checked) wanted.add(key); else wanted.delete(key);
        refresh(true);
      } }));
    status = make("span", { role: "status" });
    previous = make("button", { type: "button", onclick: () => turn(-1) }, "Previous page");
    next = make("button", { type: "button", onclick: () => turn(1) }, "Next page");
    heads = new Map(columns.map((one) => [one.key, make("th", { scope: "col", class: one.n ? "n" : "" },
      make("button", { type: "button", title: `Sort by ${one.title}; once more turns it round`,
        onclick: () => sortBy(one) }, one.title,
        make("span", { "aria-hidden": "true" })))]));
    body = make("tbody", { onkeydown: (event) => {
      if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
      const buttons = [...body.querySelectorAll("button")], here = buttons.indexOf(event.target);
      const to = buttons[here + (event.key === "ArrowDown" ? 1 : -1)];
      if (here < 0 || !to) return;
      event.preventDefault();
      buttons[here].tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    } });
    section.append(
      make("div", { class: "tools" },
        make("label", {}, "Search: ", search),
        make("div", { class: "boxes", role: "group", "aria-label": "Outcomes" },
          ...boxes.map((box) => make("label", {}, box,
            ` ${WORDS[box.value]} (${thousands(OUTCOME.filter((outcome) => outcome === box.value).length)})`))),
        make("button", { type: "button", title: "Sort the table from the worst pair on", onclick: () => {
          sort = { key: "outcome", up: false };
          refresh(true);
        } }, "Worst first"),
      ),
      make("p", { class: "hint" }, "The search looks at tap, outcome and message. "
        + "Click a row, or press Enter on its tap, for all its figures."),
      make("div", { class: "table", id: "rows" }, make("table", { "aria-labelledby": "table-title" },
        make("thead", {}, make("tr", {}, ...heads.values())), body)),
      make("div", { class: "row pager" }, previous, next, status),
    );
    refresh(true);
  }

  function find(text) {
    search.value = text;
    for (const box of boxes) { box.checked = true; wanted.add(box.value); }
    refresh(true);
    byId("table").scrollIntoView();
    search.focus();
  }
  return { build, find };
})();

// ---- Worst tensors ------------------------------------------------------------------------------

function stripOf(strip, label) {
  const cells = Math.max(strip.max_abs.length, strip.rel_diff.length);
  const sizes = Array.from({ length: cells }, (_, c) => sizeOf(strip.max_abs[c]));
  const scale = logScale(sizes);
  let top = 0;
  sizes.forEach((x, c) => { if ((x ?? -1) > (sizes[top] ?? -1)) top = c; });
  const span = (c) => {
    const from = c * strip.per_cell, to = Math.min(strip.size, from + strip.per_cell) - 1;
    return from >= to ? `${from}` : `${from}-${to}`;
  };
  const map = grid({
    rows: [""], columns: sizes.map((_, c) => span(c)), axis: "", edge: true, cellWidth: [1.5, 28],
    cell: (_, c) => (sizes[c] === null ? { none: true } : { value: sizes[c], text: "" }),
    shade: (x) => scale ? scale.at(x) : 1, start: [0, top],
    label: `max abs along ${strip.what} of ${label}. Left and right go from cell to cell.`,
    hint: "Point at a cell, or focus the strip and use the arrow keys.",
    say: (_, c) => `${strip.what} ${span(c)}: max abs ${figure(strip.max_abs[c])}, `
      + `rel diff ${figure(strip.rel_diff[c])}`,
  });
  return [
    make("h4", {}, `Along ${strip.what}, ${some(strip.size, "position")}`),
    strip.per_cell > 1 ? make("p", { class: "soft" },
      `Each cell stands for ${thousands(strip.per_cell)} positions, the worst of them.`) : null,
    ...map.elements,
    scaleLegend(scale, "max abs",
      sizes.includes(null) ? ["hatched: no figure"] : scale ? [] : ["no position differs"]),
  ];
}

function histogramOf(histogram) {
  const { a, b } = histogram, low = number(histogram.low), high = number(histogram.high);
  const bins = Math.max(a.length, b.length), gap = (k) => Math.abs((a[k] || 0) - (b[k] || 0));
  const svg = draw("svg", { role: "img" });
  const most = Math.max(1, ...a, ...b), decades = Math.max(1, Math.ceil(Math.log10(most)));
  // One element has some height, so that it does not look like none.
  const H = 168, left = 44, top = 8, bottom = H - 24;
  let W, right;
  const yOf = (n) => (n > 0 ? bottom - ((Math.log10(n) + 0.4) / (decades + 0.4)) * (bottom - top) : bottom);
  const xOf = (k) => left + (k / Math.max(1, bins)) * (right - left);
  const outline = (counts, closed) => {
    let path = closed ? `M${xOf(0)},${bottom}` : `M${xOf(0)},${yOf(counts[0] || 0)}`;
    for (let k = 0; k < bins; k++) {
      path += `L${xOf(k).toFixed(1)},${yOf(counts[k] || 0).toFixed(1)}H${xOf(k + 1).toFixed(1)}`;
    }
    return closed ? `${path}V${bottom}Z` : path;
  };
  const text = (x, y, words, anchor) =>
    draw("text", { x, y, "font-size": 12, fill: "var(--soft)", "text-anchor": anchor }, words);
  painters.push(() => {
    W = svg.parentNode.clientWidth - 24;
    right = W - 6;
    svg.setAttribute("width", W);
    svg.setAttribute("height", H);
    svg.replaceChildren();
    for (let e = 0; e <= decades; e += Math.max(1, Math.ceil(decades / 5))) {
      const y = yOf(10 ** e);
      svg.append(draw("line", { x1: left, x2: right, y1: y, y2: y, stroke: "var(--faint)" }));
      svg.append(text(left - 6, y + 4, power(e), "end"));
    }
    svg.append(
      draw("path", { d: outline(a, true), fill: "var(--line)" }),
      draw("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: "var(--soft)" }),
      draw("path", { d: outline(b, false), fill: "none", stroke: "var(--ink)", "stroke-width": 1.6 }),
      text(left, H - 6, figure(low), "start"), text((left + right) / 2, H - 6, "value", "middle"),
      text(right, H - 6, figure(high), "end"),
    );
  });
  let widest = 0;
  for (let k = 1; k < bins; k++) if (gap(k) > gap(widest)) widest = k;
  const edge = (k) => figure(low + (k / Math.max(1, bins)) * (high - low));
  const apart = gap(widest) === 0 ? "Both have the same counts."
    : `They are furthest apart from ${edge(widest)} to ${edge(widest + 1)}: `
      + `${thousands(a[widest] || 0)} in A, ${thousands(b[widest] || 0)} in B.`;
  svg.setAttribute("aria-label", `Histogram of the values from ${figure(low)} to ${figure(high)}. ${apart}`);
  return [
    make("h4", {}, "Values of both sides"),
    svg,
    make("p", { class: "soft" }, `A filled, B as a line; counts on a log scale. ${apart}`),
  ];
}

function barsOf(by) {
  const key = by.rows.some((row) => number(row.rel_diff) !== null) ? "rel_diff" : "max_abs";
  const sizes = by.rows.map((row) => sizeOf(row[key]));
  const scale = logScale(sizes);
  return [
    make("h4", {}, `By ${by.dim}: ${MEASURES[key]}`
      + (scale ? `, bars from ${power(scale.from)} to ${power(scale.to)}` : "")),
    make("ul", {
      class: "bars", tabindex: by.rows.length > 12 ? 0 : null, "aria-label": `By ${by.dim}`,
    }, ...by.rows.map((row, k) => {
      const bar = make("div", { class: "bar" });
      bar.style.width = scale && sizes[k] ? `${Math.max(2, 100 * scale.at(sizes[k]))}%` : "0";
      return make("li", {}, make("span", {}, `${by.dim} ${row.index}`), make("div", { class: "track" }, bar),
        make("span", {}, `${figure(row[key])} ${WORDS[row.outcome] || row.outcome || ""}`));
    })),
  ];
}

function buildWorst() {
  const section = byId("worst"), details = D.details || [];
  if (!details.length) {
    return say("worst", OUTCOME.every((outcome) => outcome === "equal")
      ? "There are none: no tensor differs."
      : "There are none: no tensor that differs has its elements at hand.");
  }
  const holder = make("div", { class: "worst" });
  details.forEach((detail, k) => {
    const i = detail.row, label = String(LABEL[i]);
    const parts = [
      ...(detail.strip && detail.strip.max_abs.length ? stripOf(detail.strip, label) : []),
      ...(detail.histogram && detail.histogram.a.length ? histogramOf(detail.histogram) : []),
      ...(detail.by && detail.by.rows.length ? barsOf(detail.by) : []),
    ];
    holder.append(make("article", { id: `worst-${k}`, tabindex: -1, "aria-labelledby": `worst-title-${k}` },
      make("h3", { id: `worst-title-${k}` }, label),
      make("p", { class: "soft" }, describe(i).slice(label.length + 2)),
      make("button", { type: "button", onclick: () => openDetails(i) }, "All figures"),
      ...(parts.length ? parts : [make("p", { class: "soft" }, "Nothing more is known of it.")]).filter(Boolean)));
  });
  section.append(holder);
}

// ---- Start --------------------------------------------------------------------------------------

readTheme();
buildHead();
buildOrder();
buildLayers();
buildRanks();
table.build();
buildWorst();
repaint();

let width = document.documentElement.clientWidth;
window.addEventListener("resize", () => {
  if (document.documentElement.clientWidth === width) return;
  width = document.documentElement.clientWidth;
  repaint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
for (const [event, on] of [["beforeprint", true], ["afterprint", false]]) {
  window.addEventListener(event, () => {
    document.documentElement.classList.toggle("print", on);
    repaint();
  });
}
})();
