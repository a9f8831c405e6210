"use strict";
(() => {

const D = JSON.parse(document.getElementById("data").textContent);
const SEGMENTS = D.segments;
const MOST_ROWS = 200;
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

function make(tag, attributes = {}, text) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function draw(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const figure = (x) => (x === null ? "–" : x === 0 ? "0" : x.toExponential(1));
const spanned = (ranks) => (ranks.length > 6 ? `${ranks.slice(0, 5).join(",")},… (${ranks.length})` : ranks.join(","));
const titled = (one) => `${one.label} step=${one.step}${one.occurrence ? ` occurrence=${one.occurrence}` : ""}`;

// ---- Head -----------------------------------------------------------------------------------

at("verdict").textContent = D.verdict;
D.problems.forEach((text) => at("lines").append(make("p", { class: "line first" }, `not to be trusted: ${text}`)));
D.lines.forEach((text) => at("lines").append(make("p", { class: "line" }, text)));
D.sides.forEach((side) => {
  const box = make("div", { class: "side" });
  box.append(make("h3", {}, side.title));
  side.lines.forEach((text) => box.append(make("p", { class: "mono" }, text)));
  at("sides").append(box);
});

// ---- Chart ----------------------------------------------------------------------------------

const ORDERED = [...SEGMENTS].sort((a, b) => a.order - b.order);
const PLACE = { left: 56, right: 12, top: 26, bottom: 34, height: 320 };
let pointed = -1;

function chart() {
  const box = at("chart");
  box.replaceChildren();
  if (!ORDERED.length) {
    box.append(make("p", { class: "soft" }, "There is no segment."));
    return;
  }
  const width = Math.max(320, box.clientWidth);
  const svg = draw(box, "svg", {
    width, height: PLACE.height, role: "img", tabindex: 0,
    "aria-label": `${ORDERED.length} segments, ${ORDERED.filter((one) => one.fault).length} of them faults`,
  });
  const sizes = ORDERED.flatMap((one) => [one.error, one.expected, one.siblings]).filter((x) => x > 0);
  const low = Math.floor(Math.log10(Math.min(1e-8, ...sizes))) - 1;
  const high = Math.ceil(Math.log10(Math.max(1e-3, ...sizes)));
  const inner = width - PLACE.left - PLACE.right;
  const each = inner / ORDERED.length;
  const x = (i) => PLACE.left + (i + 0.5) * each;
  const y = (value) => {
    const share = value === null ? 1 : value > 0 ? (Math.log10(value) - low) / (high - low) : 0;
    return PLACE.height - PLACE.bottom - share * (PLACE.height - PLACE.top - PLACE.bottom);
  };
  for (let power = low + 1; power <= high; power += Math.ceil((high - low) / 8)) {
    draw(svg, "line", { x1: PLACE.left, x2: width - PLACE.right, y1: y(10 ** power), y2: y(10 ** power), stroke: "var(--faint)" });
    draw(svg, "text", { x: PLACE.left - 6, y: y(10 ** power) + 4, "text-anchor": "end", fill: "var(--soft)", "font-size": 11 }, `1e${power}`);
  }
  draw(svg, "text", { x: PLACE.left - 6, y: y(0) + 4, "text-anchor": "end", fill: "var(--soft)", "font-size": 11 }, "equal");
  ORDERED.forEach((one, i) => {
    if (i === 0 || one.step === ORDERED[i - 1].step) return;
    draw(svg, "line", { x1: x(i) - each / 2, x2: x(i) - each / 2, y1: PLACE.top, y2: y(0), stroke: "var(--line)" });
  });
  const steps = new Map();
  ORDERED.forEach((one, i) => steps.set(one.step, [...(steps.get(one.step) || []), i]));
  let free = 0;
  for (const [step, places] of steps) {
    const middle = (x(places[0]) + x(places[places.length - 1])) / 2;
    if (middle < free) continue;
    draw(svg, "text", { x: middle, y: PLACE.height - 8, "text-anchor": "middle", fill: "var(--soft)", "font-size": 11 }, `step ${step}`);
    free = middle + 56;
  }
  let band = "", dots = "";
  ORDERED.forEach((one, i) => {
    const half = Math.max(0.6, each * 0.4);
    if (one.expected > 0) {
      const top = y(one.expected), bottom = one.siblings > 0 ? Math.max(y(one.siblings), top + 1) : top + 2;
      band += `M${x(i) - half} ${top}H${x(i) + half}V${bottom}H${x(i) - half}Z`;
    }
    if (!one.fault) dots += `M${x(i) - 2} ${y(one.error) - 2}h4v4h-4z`;
  });
  draw(svg, "path", { d: band, fill: "var(--line)", opacity: 0.75, class: "band" });
  draw(svg, "path", { d: dots, fill: "var(--accent)", class: "dots" });
  let edge = -Infinity;
  ORDERED.forEach((one, i) => {
    if (!one.fault) return;
    const cx = x(i), cy = y(one.error);
    draw(svg, "path", { d: `M${cx} ${cy - 7}L${cx + 7} ${cy}L${cx} ${cy + 7}L${cx - 7} ${cy}Z`, fill: "var(--first)", class: "fault" });
    if (cx < edge) return;
    const isRight = cx > width - 180;
    const text = one.label.length > 26 ? `${one.label.slice(0, 25)}…` : one.label;
    draw(svg, "text", { x: cx + (isRight ? -10 : 10), y: cy - 9, "text-anchor": isRight ? "end" : "start", fill: "var(--first)", "font-size": 12 }, text);
    edge = cx + 8 * text.length;
  });
  const mark = draw(svg, "line", { y1: PLACE.top, y2: y(0), stroke: "var(--soft)", "stroke-dasharray": "3 3", visibility: "hidden" });
  const show = (i) => {
    pointed = Math.max(0, Math.min(ORDERED.length - 1, i));
    const one = ORDERED[pointed];
    mark.setAttribute("x1", x(pointed));
    mark.setAttribute("x2", x(pointed));
    mark.setAttribute("visibility", "visible");
    at("pointed").textContent =
      `${titled(one)}, rank ${spanned(one.rank)}: ${figure(one.error)} (up to ${figure(one.expected)} is rounding)` +
      `${one.fault ? `, ${one.class}` : ""}: ${one.evidence}`;
  };
  svg.addEventListener("pointermove", (event) => {
    show(Math.floor((event.clientX - svg.getBoundingClientRect().left - PLACE.left) / each));
  });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    show(pointed + by);
  });
}

// ---- Table ----------------------------------------------------------------------------------

const COLUMNS = [
  ["segment", (one) => titled(one)],
  ["from", (one) => one.begins.join(", ")],
  ["ranks", (one) => spanned(one.rank) + (one.rank.length < one.of ? ` of ${one.of}` : "")],
  ["error", (one) => figure(one.error)],
  ["rounding", (one) => figure(one.expected)],
  ["siblings", (one) => figure(one.siblings)],
  ["what", (one) => one.class || (one.error ? "rounding" : "equal")],
  ["evidence", (one) => one.evidence],
];
let rows = MOST_ROWS;

function table() {
  const sought = at("find").value.trim().toLowerCase(), only = at("only").checked;
  const found = SEGMENTS.filter((one) =>
    (!only || one.fault) && (!sought || `${titled(one)} ${one.class || ""} ${one.evidence}`.toLowerCase().includes(sought)));
  at("body").replaceChildren(...found.slice(0, rows).map((one) => {
    const row = make("tr", one.fault ? { class: "fault" } : {});
    COLUMNS.forEach(([, text], i) => row.append(make(i ? "td" : "th", i ? {} : { scope: "row" }, text(one))));
    return row;
  }));
  at("shown").textContent = `${Math.min(rows, found.length)} of ${found.length} shown` +
    (D.left_out ? `; ${D.left_out} more are in the log` : "");
  at("more").hidden = found.length <= rows;
}

COLUMNS.forEach(([title]) => at("titles").append(make("th", { scope: "col" }, title)));
at("find").addEventListener("input", () => { rows = MOST_ROWS; table(); });
at("only").addEventListener("change", () => { rows = MOST_ROWS; table(); });
at("more").addEventListener("click", () => { rows += MOST_ROWS; table(); });

// ---- Not judged -----------------------------------------------------------------------------

D.not_judged.forEach((one) => {
  at("unjudged").append(make("li", {}, `${titled(one)}, rank ${spanned(one.rank)}: ${one.why}`));
});
if (!D.not_judged.length) at("unjudged").append(make("li", { class: "soft" }, "All that was tapped was judged."));

chart();
table();
let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(chart, 100); });

})();
