"use strict";
// The confusion report in the browser. All data is in the page; the script fetches nothing.
//
// A class is a class id. A place is the index of a row and column: of a class in the chosen order, or of a group of classes.
// Rows are true classes, columns are predicted classes.

const data = JSON.parse(document.getElementById("data").textContent);
const numClasses = data.names.length;
const GROUPS = ["many", "medium", "few"];

const decode = (text) => new Int32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const cellsOf = (columns) => columns && { rows: decode(columns.true_class), columns: decode(columns.predicted_class), counts: decode(columns.count) };
const runs = data.runs.map((run) => ({
  ...run,
  trainCounts: decode(run.train_counts),
  groups: decode(run.groups),
  cells: cellsOf(run.matrix),
  confused: cellsOf(run.confusion_pairs),
}));

const formats = [0, 1].map((digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
const number = (value, digits = 0) => formats[digits].format(value);
const percent = (value) => (value > 0 && value < 1 ? value.toFixed(2) : value.toFixed(1)) + " %";
const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(1);
const $ = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

// -- numbers of a run -------------------------------------------------------------------------------------------------

function sums(cells, by) {
  const found = new Int32Array(numClasses);
  for (let i = 0; i < cells.counts.length; i++) found[by[i]] += cells.counts[i];
  return found;
}

function lookup(cells) { // count of (row, column)
  const found = new Map();
  for (let i = 0; i < cells.counts.length; i++) found.set(cells.rows[i] * numClasses + cells.columns[i], cells.counts[i]);
  return (row, column) => found.get(row * numClasses + column) || 0;
}

for (const run of runs) {
  run.testCounts = sums(run.cells, run.cells.rows);
  run.predicted = sums(run.cells, run.cells.columns);
  run.count = lookup(run.cells);
  run.accuracy = Array.from(run.testCounts, (total, c) => (total ? (100 * run.count(c, c)) / total : NaN));
  if (run.confused) {
    run.errors = decode(run.errors);
    run.trainedOn = lookup(run.confused);
  }
}

// -- order of classes -------------------------------------------------------------------------------------------------

const ids = Array.from({ length: numClasses }, (_, c) => c);
const ORDERS = {
  count: () => ids.slice().sort((a, b) => runs[0].trainCounts[b] - runs[0].trainCounts[a] || a - b),
  confusion: () => Array.from(decode(data.clustered)),
  accuracy: () => { // classes without test images last
    const of = (c) => (runs[0].testCounts[c] ? runs[0].accuracy[c] : -1);
    return ids.slice().sort((a, b) => of(b) - of(a) || a - b);
  },
  name: () => ids.slice().sort((a, b) => data.names[a].localeCompare(data.names[b], "en", { numeric: true }) || a - b),
};

function layout(orderName, grouping) {
  const order = ORDERS[orderName]();
  const placeOf = new Int32Array(numClasses);
  let members;
  if (grouping === "classes") members = order.map((c) => [c]);
  else if (grouping === "groups") members = GROUPS.map((_, g) => order.filter((c) => runs[0].groups[c] === g)).filter((m) => m.length);
  else {
    const parts = Math.min(10, numClasses);
    members = [];
    for (let g = 0, from = 0; g < parts; g++) { // if the classes do not divide evenly, the first groups have one more
      const size = Math.floor(numClasses / parts) + (g < numClasses % parts ? 1 : 0);
      members.push(order.slice(from, (from += size)));
    }
  }
  members.forEach((classes, place) => classes.forEach((c) => (placeOf[c] = place)));
  const labels = members.map((classes) => groupLabel(classes, orderName, grouping));
  return { size: members.length, placeOf, members, labels, single: grouping === "classes", orderName };
}

function groupLabel(classes, orderName, grouping) {
  if (grouping === "groups") return GROUPS[runs[0].groups[classes[0]]];
  if (classes.length === 1) return data.names[classes[0]];
  const counts = classes.map((c) => runs[0].trainCounts[c]);
  if (orderName === "count") return `${number(Math.max(...counts))} to ${number(Math.min(...counts))}`;
  return `${data.names[classes[0]]} … ${data.names[classes[classes.length - 1]]}`;
}

// Return the cells of a run in a layout: images, and per cent of the row's test images.
function laidOut(run, places) {
  const { size, placeOf } = places;
  const found = new Map();
  const totals = new Float64Array(size);
  run.testCounts.forEach((total, c) => (totals[placeOf[c]] += total));
  const { rows, columns, counts } = run.cells;
  for (let i = 0; i < counts.length; i++) {
    if (!state.diagonal && rows[i] === columns[i]) continue; // confusions within a group are kept
    const key = placeOf[rows[i]] * size + placeOf[columns[i]];
    found.set(key, (found.get(key) || 0) + counts[i]);
  }
  return { found, totals, percent: (key) => (100 * (found.get(key) || 0)) / Math.max(1, totals[Math.floor(key / size)]) };
}

// -- the heat maps ----------------------------------------------------------------------------------------------------

const state = { order: "count", grouping: "classes", diagonal: true, numbers: "percent", row0: 0, column0: 0, span: numClasses, cursor: null, pinned: false };
let places = null;
let maps = [];

function palette(kind) {
  const stops = data.colours[kind][dark.matches ? "dark" : "light"];
  return (share) => stops[Math.max(0, Math.min(stops.length - 1, Math.round(share * (stops.length - 1))))];
}

// Return the position of a value on its colour scale. The square root makes 1 % differ visibly from 0, and 10 % from 40 %.
const place = (value) => Math.sqrt(Math.min(100, Math.abs(value)) / 100);

class HeatMap {
  constructor(title, run, against) {
    this.run = run;
    this.against = against; // the run that is subtracted in a map of differences
    this.title = title;
    this.canvas = element("canvas", { tabIndex: 0, role: "application", "aria-roledescription": "heat map", "aria-label": `${title}. Arrow keys move from cell to cell, plus and minus zoom, 0 resets the zoom, Enter pins the cell.` });
    this.figure = element("figure", {}, ...(runs.length > 1 ? [element("h3", { textContent: title })] : []), this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.moved(event));
    this.canvas.addEventListener("pointerleave", () => { hideTip(); if (!state.pinned) { state.cursor = null; redraw(); showCell(); } });
    this.canvas.addEventListener("pointerdown", (event) => this.pressed(event));
    this.canvas.addEventListener("click", (event) => this.clicked(event));
    this.canvas.addEventListener("dblclick", (event) => { const cell = this.at(event); if (cell) zoom(0.5, cell); });
    this.canvas.addEventListener("wheel", (event) => this.wheeled(event), { passive: false });
    this.canvas.addEventListener("keydown", (event) => pressed(event));
  }

  prepare() {
    this.own = laidOut(this.run, places);
    this.other = this.against ? laidOut(this.against, places) : null;
    const { size } = places;
    const keys = this.other ? [...new Set([...this.own.found.keys(), ...this.other.found.keys()])] : [...this.own.found.keys()];
    this.sorted = keys // small values first: large ones are drawn on top
      .map((key) => ({ row: Math.floor(key / size), column: key % size, value: this.value(key) }))
      .sort((a, b) => Math.abs(a.value) - Math.abs(b.value));
  }

  value(key) {
    return this.other ? this.own.percent(key) - this.other.percent(key) : this.own.percent(key);
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth || 600;
    const context = this.canvas.getContext("2d");
    const { span, row0, column0 } = state;
    context.font = "12px system-ui, sans-serif";
    // The margin fits the names, up to a quarter of the width. Names are left out if their lines would be too close.
    const longest = Math.max(...this.inView(row0, Math.min(span, 200)).map((p) => context.measureText(places.labels[p]).width));
    let margin = Math.min(width / 4, 26 + longest);
    const named = (width - margin - 8) / span >= 7;
    if (!named) margin = 26;
    const side = width - margin - 8;
    const cell = side / span;
    Object.assign(this, { margin, side, cell });
    const height = margin + side + 8;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = colour("zero");
    context.fillRect(margin, margin, side, side);
    context.save();
    context.beginPath();
    context.rect(margin, margin, side, side);
    context.clip();
    this.drawCells(context);
    this.drawLines(context);
    this.drawCursor(context);
    context.restore();
    context.strokeStyle = colour("quiet");
    context.strokeRect(margin, margin, side, side);
    if (named) this.drawNames(context);
    else this.drawGroups(context);
  }

  inView(from, span) {
    const found = [];
    for (let p = Math.max(0, Math.floor(from)); p < Math.min(places.size, Math.ceil(from + span)); p++) found.push(p);
    return found;
  }

  x(column) { return this.margin + (column - state.column0) * this.cell; }
  y(row) { return this.margin + (row - state.row0) * this.cell; }

  drawCells(context) {
    const { cell } = this;
    const sequential = palette("confusion"), diverging = palette("difference");
    const drawn = Math.max(cell, 2); // at least two pixels: smaller single cells of large matrices would be invisible
    const gap = cell > 6 ? 0.5 : 0;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const { row, column, value } of this.sorted) {
      if (row < state.row0 - 1 || row > state.row0 + state.span || column < state.column0 - 1 || column > state.column0 + state.span) continue;
      const share = this.other ? 0.5 + (Math.sign(value) * place(value)) / 2 : place(value);
      const fill = this.other ? diverging(share) : sequential(share);
      context.fillStyle = fill;
      context.fillRect(this.x(column), this.y(row), drawn - gap, drawn - gap);
      if (cell >= 26) {
        const images = this.own.found.get(row * places.size + column) || 0;
        context.fillStyle = luminance(fill) > 0.35 ? "#000" : "#fff";
        const shown = this.other ? signed(value) : state.numbers === "images" ? number(images) : value >= 1 ? value.toFixed(0) : "<1";
        context.font = `${Math.min(13, (1.4 * cell) / Math.max(3, shown.length))}px system-ui, sans-serif`;
        context.fillText(shown, this.x(column) + cell / 2, this.y(row) + cell / 2);
      }
    }
  }

  drawLines(context) {
    if (places.orderName !== "count" || !places.single) return;
    context.strokeStyle = colour("quiet");
    context.lineWidth = 1;
    for (const [, first] of groupSpans().slice(1)) {
      context.beginPath();
      context.moveTo(this.x(0), this.y(first));
      context.lineTo(this.x(places.size), this.y(first));
      context.moveTo(this.x(first), this.y(0));
      context.lineTo(this.x(first), this.y(places.size));
      context.stroke();
    }
  }

  drawCursor(context) {
    if (!state.cursor) return;
    const { row, column } = state.cursor;
    context.fillStyle = dark.matches ? "rgb(255 255 255 / .12)" : "rgb(0 0 0 / .07)";
    context.fillRect(this.margin, this.y(row), this.side, Math.max(1, this.cell));
    context.fillRect(this.x(column), this.margin, Math.max(1, this.cell), this.side);
    context.strokeStyle = colour("text");
    context.lineWidth = 2;
    const size = Math.max(this.cell, 8);
    context.strokeRect(this.x(column) - (size - this.cell) / 2, this.y(row) - (size - this.cell) / 2, size, size);
    context.lineWidth = 1;
  }

  drawNames(context) {
    const font = Math.min(13, Math.max(8, this.cell * 0.85));
    context.font = `${font}px system-ui, sans-serif`;
    context.fillStyle = colour("text");
    const room = this.margin - 8;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const p of this.inView(state.row0, state.span)) {
      const y = this.y(p) + this.cell / 2;
      if (y > this.margin && y < this.margin + this.side) context.fillText(fitted(context, places.labels[p], room), this.margin - 5, y);
    }
    context.textAlign = "left";
    for (const p of this.inView(state.column0, state.span)) {
      const x = this.x(p) + this.cell / 2;
      if (x < this.margin || x > this.margin + this.side) continue;
      context.save();
      context.translate(x, this.margin - 5);
      context.rotate(-Math.PI / 2);
      context.fillText(fitted(context, places.labels[p], room), 0, 0);
      context.restore();
    }
  }

  drawGroups(context) {
    context.fillStyle = colour("quiet");
    context.font = "13px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    const middle = this.margin / 2;
    const spans = places.orderName === "count" && places.single ? groupSpans() : [["predicted", 0, places.size]];
    for (const [name, first, end] of spans) {
      const from = Math.max(first, state.column0), to = Math.min(end, state.column0 + state.span);
      if (to > from && (to - from) * this.cell > 30) context.fillText(name, this.x((from + to) / 2), middle);
    }
    for (const [name, first, end] of spans.map(([n, a, b]) => [n === "predicted" ? "true" : n, a, b])) {
      const from = Math.max(first, state.row0), to = Math.min(end, state.row0 + state.span);
      if (to <= from || (to - from) * this.cell <= 30) continue;
      context.save();
      context.translate(middle, this.y((from + to) / 2));
      context.rotate(-Math.PI / 2);
      context.fillText(name, 0, 0);
      context.restore();
    }
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left - this.margin, event.clientY - box.top - this.margin];
    if (x < 0 || y < 0 || x >= this.side || y >= this.side) return null;
    return this.nearest(Math.floor(y / this.cell + state.row0), Math.floor(x / this.cell + state.column0));
  }

  // Return the cell to select. Small cells are hard to hit: if the one under the pointer is empty, take the largest within 3 pixels.
  nearest(row, column) {
    const seen = this.cell >= 2 && this.value(row * places.size + column); // drawn at its real size
    const reach = this.cell >= 5 || seen ? 0 : Math.ceil(3 / this.cell);
    let best = { row, column }, most = -1;
    for (let r = Math.max(0, row - reach); reach && r <= Math.min(places.size - 1, row + reach); r++)
      for (let c = Math.max(0, column - reach); c <= Math.min(places.size - 1, column + reach); c++) {
        const value = Math.abs(this.value(r * places.size + c));
        if (value > most) [best, most] = [{ row: r, column: c }, value];
      }
    return best;
  }

  pressed(event) {
    if (event.button) return;
    this.canvas.setPointerCapture(event.pointerId); // a drag may leave the map
    this.dragged = { x: event.clientX, y: event.clientY, row0: state.row0, column0: state.column0, far: false };
  }

  moved(event) {
    const from = this.dragged;
    if (this.canvas.hasPointerCapture(event.pointerId)) {
      hideTip();
      from.far ||= Math.hypot(event.clientX - from.x, event.clientY - from.y) > 4;
      if (!from.far) return;
      look(from.row0 - (event.clientY - from.y) / this.cell, from.column0 - (event.clientX - from.x) / this.cell, state.span);
      return;
    }
    const cell = this.at(event);
    if (cell) showTip(event, describe(cell)); else hideTip();
    if (state.pinned) return;
    if (cell?.row === state.cursor?.row && cell?.column === state.cursor?.column) return;
    state.cursor = cell;
    redraw();
    showCell();
  }

  clicked(event) {
    const cell = this.at(event);
    if (this.dragged?.far || !cell) return;
    const same = state.pinned && cell.row === state.cursor?.row && cell.column === state.cursor?.column;
    state.pinned = !same;
    state.cursor = cell;
    redraw();
    showCell();
  }

  wheeled(event) {
    // As in online maps, the wheel scrolls the page unless Ctrl is held. A pinch gesture sends Ctrl.
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const cell = this.at(event);
    if (cell) zoom(event.deltaY > 0 ? 1.25 : 0.8, cell);
  }
}

function groupSpans() {
  const found = [];
  places.members.forEach(([c], p) => {
    const name = GROUPS[runs[0].groups[c]];
    const last = found[found.length - 1];
    if (last && last[0] === name) last[2] = p + 1; else found.push([name, p, p + 1]);
  });
  return found;
}

function fitted(context, text, room) {
  const width = context.measureText(text).width;
  if (width <= room) return text;
  let length = Math.ceil((text.length * room) / width); // an estimate, because names may be very long
  while (length > 1 && context.measureText(text.slice(0, length) + "…").width > room) length--;
  return text.slice(0, length) + "…";
}

function luminance(hex) {
  const channel = (at) => (parseInt(hex.slice(at, at + 2), 16) / 255) ** 2.2;
  return 0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5);
}

function look(row0, column0, span) {
  state.span = Math.max(Math.min(3, places.size), Math.min(places.size, span));
  const edge = places.size - state.span;
  state.row0 = Math.max(0, Math.min(edge, row0));
  state.column0 = Math.max(0, Math.min(edge, column0));
  redraw();
}

function zoom(factor, cell) {
  const inView = (at, from) => at + 1 > from && at < from + state.span;
  const seen = state.cursor && inView(state.cursor.row, state.row0) && inView(state.cursor.column, state.column0);
  const { row, column } = cell || (seen && state.cursor) || { row: state.row0 + state.span / 2, column: state.column0 + state.span / 2 };
  const span = Math.max(Math.min(3, places.size), Math.min(places.size, state.span * factor));
  const kept = span / state.span; // the cell keeps its position on the screen
  look(row - (row - state.row0) * kept, column - (column - state.column0) * kept, span);
}

function goTo(row, column) {
  state.cursor = { row, column };
  state.pinned = true;
  let { row0, column0, span } = state;
  if (row < row0 || row >= row0 + span) row0 = row - span / 2;
  if (column < column0 || column >= column0 + span) column0 = column - span / 2;
  look(row0, column0, span);
  showCell();
  $("spoken").textContent = describe(state.cursor);
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser uses these: zoom, back
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0] };
  const last = places.size - 1;
  const { row, column } = state.cursor || { row: Math.floor(state.row0), column: Math.floor(state.column0) };
  if (moves[event.key]) {
    const [down, right] = state.cursor ? moves[event.key] : [0, 0];
    goTo(Math.max(0, Math.min(last, row + down)), Math.max(0, Math.min(last, column + right)));
  } else if (event.key === "Home") goTo(row, 0);
  else if (event.key === "End") goTo(row, last);
  else if (event.key === "+" || event.key === "=") zoom(0.6);
  else if (event.key === "-") zoom(1 / 0.6);
  else if (event.key === "0") look(0, 0, places.size);
  else if (event.key === "Enter") { state.pinned = true; showCell(); }
  else if (event.key === "Escape") { state.pinned = false; state.cursor = null; hideTip(); redraw(); showCell(); }
  else return;
  event.preventDefault();
}

let asked = false;
function redraw() { // at most once per frame, whatever the number of events
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; maps.forEach((map) => map.draw()); });
}

function rearrange() {
  places = layout(state.order, state.grouping);
  maps.forEach((map) => map.prepare());
  state.cursor = null;
  state.pinned = false;
  look(0, 0, places.size);
  showCell();
}

// A right-to-left name must not reverse the sentence around it.
const isolated = (name) => (/[\u0590-\u08ff]/.test(name) ? `\u2068${name}\u2069` : name);

// -- one cell in words ------------------------------------------------------------------------------------------------

function describe({ row, column }) {
  const key = row * places.size + column;
  const same = row === column;
  const [from, to] = [isolated(places.labels[row]), isolated(places.labels[column])];
  const verb = !same ? `${from} predicted as ${to}` : places.single ? `${from}, correct` : `${from} predicted as a class of the same group`;
  const lines = runs.map((run, r) => {
    const { own } = maps[r];
    const right = same ? places.members[row].reduce((sum, c) => sum + run.count(c, c), 0) : 0;
    const images = (own.found.get(key) || 0) + (same && !state.diagonal ? right : 0);
    const share = percent((100 * images) / Math.max(1, own.totals[row]));
    const text = `${number(images)} of ${number(own.totals[row])} test images (${share})${same && !places.single ? `, ${number(right)} of them correct` : ""}`;
    return runs.length > 1 ? `${run.name}: ${text}` : text;
  });
  return [verb, ...lines, ...(places.single ? [trainingLine(places.members[row][0], places.members[column][0])] : [])].join("\n");
}

function trainingLine(row, column) {
  const counts = runs[0].trainCounts;
  return row === column ? `${number(counts[row])} training images` : `training images: ${number(counts[row])} and ${number(counts[column])}`;
}

function showTip(event, text) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const right = event.pageX + 14 + tip.offsetWidth > document.documentElement.clientWidth;
  tip.style.left = `${Math.max(4, right ? event.pageX - 14 - tip.offsetWidth : event.pageX + 14)}px`;
  tip.style.top = `${event.pageY + 14}px`;
}

function hideTip() { $("tip").hidden = true; }

function trainingConfusions(run, a, b) {
  const count = run.trainedOn(a, b);
  if (run.trimmed && !count && !run.count(a, b) && !run.count(b, a)) return "not among the class's ten largest";
  return `${number(count)} of ${number(run.errors[a])} confusions of the class`;
}

const imagesOf = new Map(); // cell -> indices of its thumbnails, which are of the first run
if (data.images) {
  const [rows, columns] = [decode(data.images.true_class), decode(data.images.predicted_class)];
  rows.forEach((row, i) => {
    const key = row * numClasses + columns[i];
    if (!imagesOf.has(key)) imagesOf.set(key, []);
    imagesOf.get(key).push(i);
  });
}

function showCell() {
  const panel = $("cell");
  if (!state.cursor) {
    panel.replaceChildren(element("h3", { textContent: "A cell" }), element("p", { className: "quiet", textContent: "Point at a cell to see its numbers and, if the page has them, its test images. A click pins the cell; another click, or Escape, unpins it." }));
    return;
  }
  const { row, column } = state.cursor;
  const [verb, ...lines] = describe(state.cursor).split("\n");
  const list = element("dl");
  const fact = (name, value) => list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
  panel.replaceChildren(element("h3", { textContent: verb }), ...lines.map((line) => element("p", { textContent: line })));
  if (!places.single) { // a cell of two groups
    fact("classes", `${places.members[row].length} true, ${places.members[column].length} predicted`);
    panel.append(list);
    return;
  }
  const [a, b] = [places.members[row][0], places.members[column][0]];
  for (const run of runs) {
    const name = runs.length > 1 ? run.name : "";
    if (a !== b) fact(name ? `${name}, reverse` : "reverse", `${number(run.count(b, a))} of ${number(run.testCounts[b])}`);
    if (a !== b && run.confused) fact(name ? `${name}, training` : "in training", trainingConfusions(run, a, b));
    if (a === b) fact(name ? `${name}, false positives` : "false positives", `${number(run.predicted[a] - run.count(a, a))} images of other classes`);
  }
  panel.append(list);
  const found = imagesOf.get(a * numClasses + b) || [];
  if (found.length) {
    const all = runs[0].count(a, b);
    const which = `${found.length < all ? `the ${found.length} most confident of ${number(all)} images` : "its images"}${runs.length > 1 ? ` of ${runs[0].name}` : ""}:`;
    panel.append(element("p", { className: "quiet", textContent: which }), element("div", { className: "thumbs" }, ...found.map((i) => thumbnail(i, verb))));
  }
  else if (a !== b && runs[0].count(a, b) && data.images) panel.append(element("p", { className: "quiet", textContent: "The page has images of the most confused cells only, not of this one." }));
}

function thumbnail(index, words) {
  const { columns, side, width, height } = data.images;
  const scale = 64 / side;
  const thumb = element("div", { className: "thumb", role: "img", title: `confidence ${(data.images.confidence[index] / 100).toFixed(2)}`, "aria-label": `test image: ${words}, confidence ${(data.images.confidence[index] / 100).toFixed(2)}` });
  thumb.style.backgroundSize = `${width * scale}px ${height * scale}px`;
  thumb.style.backgroundPosition = `${-(index % columns) * 64}px ${-Math.floor(index / columns) * 64}px`;
  return thumb;
}

// -- tables that sort -------------------------------------------------------------------------------------------------

// columns: {name, of(row) -> string or number, numeric?, text?(value) -> string, left?: a number that is shown as text}.
// Long tables show their first rows; a button shows more.
function sortable(table, columns, rows, matches, search, by, step = 100) {
  const state = { by, down: true, shown: step };
  const body = table.tBodies[0];
  const more = element("button", { type: "button" });
  table.parentElement.after(more);
  table.tHead.replaceChildren(element("tr", {}, ...columns.map(({ name, numeric, left }, i) => {
    const button = element("button", { type: "button", textContent: name });
    button.addEventListener("click", () => { state.down = state.by === i ? !state.down : numeric; state.by = i; fill(); });
    return element("th", { scope: "col", className: numeric && !left ? "number" : "" }, button);
  })));
  const fill = () => {
    const wanted = search.value.trim().toLowerCase();
    const { of, numeric } = columns[state.by];
    const sign = state.down ? -1 : 1;
    const chosen = wanted ? rows.filter((row) => matches(row).toLowerCase().includes(wanted)) : rows.slice();
    chosen.sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      if (!numeric) return sign * x.localeCompare(y, "en", { numeric: true });
      return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y);
    });
    body.replaceChildren(...chosen.slice(0, state.shown).map((row) => {
      const line = element("tr", {}, ...columns.map(({ of, text, numeric, left }, i) => {
        const value = of(row);
        const cell = element(i ? "td" : "th", { className: numeric && !left ? "number" : "", textContent: text ? text(value) : numeric ? number(value) : value });
        if (!i) {
          cell.setAttribute("scope", "row");
          cell.replaceChildren(element("button", { type: "button", textContent: cell.textContent })); // its click reaches the row's listener
        }
        return cell;
      }));
      line.addEventListener("click", () => row.show?.());
      return line;
    }));
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      if (i === state.by) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending"); else cell.removeAttribute("aria-sort");
    });
    more.hidden = chosen.length <= state.shown;
    more.textContent = `Show more (${number(Math.min(state.shown, chosen.length))} of ${number(chosen.length)})`;
    table.caption.textContent = `${table.dataset.caption}: ${number(chosen.length)}`;
  };
  more.addEventListener("click", () => {
    state.shown += step * 4;
    fill();
    if (more.hidden) table.focus(); // the hidden button would lose the focus
  });
  table.tabIndex = -1;
  search.addEventListener("input", () => { fill(); $("spoken").textContent = table.caption.textContent; });
  fill();
}

function showInMap(row, column) {
  if (!places.single) { $("grouping").value = state.grouping = "classes"; rearrange(); }
  goTo(places.placeOf[row], places.placeOf[column]);
  $("matrix").scrollIntoView({ block: "start" });
}

const dash = (text) => (value) => (Number.isNaN(value) ? "-" : text(value));

function pairTable() {
  const [rarer, frequent] = [decode(data.pairs.rarer_class), decode(data.pairs.commoner_class)];
  const rows = Array.from(rarer, (r, i) => ({ r, c: frequent[i], show: () => showInMap(r, frequent[i]) }));
  const both = (run) => ({ r, c }) => run.count(r, c) + run.count(c, r);
  const columns = [
    { name: "rarer class", of: ({ r }) => data.names[r] },
    { name: "training images", of: ({ r }) => runs[0].trainCounts[r], numeric: true },
    { name: "more frequent class", of: ({ c }) => data.names[c] },
    { name: "its training images", of: ({ c }) => runs[0].trainCounts[c], numeric: true },
  ];
  for (const run of runs) {
    const name = runs.length > 1 ? `, ${run.name}` : "";
    columns.push({ name: `confusions${name}`, of: both(run), numeric: true });
    columns.push({ name: `rarer predicted as more frequent${name}`, of: ({ r, c }) => run.count(r, c), numeric: true });
    // With equally many training images neither class is the rarer one.
    const share = ({ r, c }) => (runs[0].trainCounts[r] < runs[0].trainCounts[c] ? (100 * run.count(r, c)) / both(run)({ r, c }) : NaN);
    columns.push({ name: `rarer predicted as more frequent, %${name}`, of: share, text: dash((v) => v.toFixed(0)), numeric: true });
    if (run.confused) columns.push({ name: `in training${name}`, of: ({ r, c }) => run.trainedOn(r, c) + run.trainedOn(c, r), numeric: true });
  }
  for (const run of runs.slice(1)) columns.push({ name: `change, ${run.name}`, of: (row) => both(run)(row) - both(runs[0])(row), text: (v) => (v > 0 ? "+" : "") + number(v), numeric: true });
  sortable($("pairs"), columns, rows, ({ r, c }) => `${data.names[r]} ${data.names[c]}`, $("pairs-search"), 4);
}

function classTable() {
  const run = runs[0], of = runs.length > 1 ? `, ${run.name}` : "";
  const wrong = new Array(numClasses).fill(null); // the most frequent wrong prediction per class
  for (let i = 0; i < run.cells.counts.length; i++) {
    const [row, column, count] = [run.cells.rows[i], run.cells.columns[i], run.cells.counts[i]];
    if (row !== column && (!wrong[row] || count > wrong[row].count)) wrong[row] = { column, count };
  }
  const columns = [
    { name: "class", of: ({ c }) => data.names[c] },
    { name: "group", of: ({ c }) => run.groups[c], text: (v) => GROUPS[v], numeric: true, left: true },
    { name: "training images", of: ({ c }) => run.trainCounts[c], numeric: true },
    { name: "test images", of: ({ c }) => run.testCounts[c], numeric: true },
    ...runs.map((r) => ({ name: runs.length > 1 ? `accuracy, ${r.name}` : "accuracy", of: ({ c }) => r.accuracy[c], text: dash(percent), numeric: true })),
    { name: `precision${of}`, of: ({ c }) => (run.predicted[c] ? (100 * run.count(c, c)) / run.predicted[c] : NaN), text: dash(percent), numeric: true },
    { name: `top wrong prediction${of}`, of: ({ c }) => (wrong[c] ? data.names[wrong[c].column] : "-") },
    { name: `its count${of}`, of: ({ c }) => (wrong[c] ? wrong[c].count : 0), numeric: true },
  ];
  const rows = ids.map((c) => ({ c, show: () => showInMap(c, wrong[c] ? wrong[c].column : c) }));
  sortable($("classes"), columns, rows, ({ c }) => data.names[c], $("classes-search"), 2);
}

// -- plots ------------------------------------------------------------------------------------------------------------

const SCALES = {
  linear: { of: (v) => v, ticks: (low, high) => nice(low, high) },
  root: { of: Math.sqrt, ticks: (low, high) => [0, 1, 5, 10, 25, 50, 75, 100].filter((v) => v >= low && v <= high) },
  log: { of: (v) => Math.log10(Math.max(v, 0.5)), ticks: (low, high) => [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6].filter((v) => v >= low && v <= high) },
};

function nice(low, high) {
  const step = [0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 25, 50, 100, 1e3, 1e4].find((s) => (high - low) / s <= 6) || 1e5;
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) found.push(Math.round(v * 1e6) / 1e6);
  return found;
}

class Plot {
  // spec: {x, y: {label, low, high, scale}, points: [{x, y, text, colour, size}], lines: [{from, to, colour, dashed}], bars: [{from, to, y, colour, text}]}
  constructor(id, make) {
    this.canvas = $(id);
    this.make = make;
    this.canvas.addEventListener("pointermove", (event) => this.moved(event));
    this.canvas.addEventListener("pointerleave", hideTip);
  }

  draw() {
    const spec = (this.spec = this.make());
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth || 480, height = 320;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const box = { left: 56, right: width - 10, top: 10, bottom: height - 44 };
    const along = (axis, from, to) => {
      const { of } = SCALES[axis.scale || "linear"];
      return (v) => from + ((of(v) - of(axis.low)) / (of(axis.high) - of(axis.low))) * (to - from);
    };
    const x = (this.x = along(spec.x, box.left, box.right)), y = (this.y = along(spec.y, box.bottom, box.top));
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colour("quiet");
    context.strokeStyle = colour("line");
    context.textAlign = "center";
    for (const v of SCALES[spec.x.scale || "linear"].ticks(spec.x.low, spec.x.high)) {
      context.beginPath(); context.moveTo(x(v), box.top); context.lineTo(x(v), box.bottom); context.stroke();
      context.fillText(number(v, v % 1 ? 1 : 0), x(v), box.bottom + 16);
    }
    context.textAlign = "right";
    for (const v of SCALES[spec.y.scale || "linear"].ticks(spec.y.low, spec.y.high)) {
      context.beginPath(); context.moveTo(box.left, y(v)); context.lineTo(box.right, y(v)); context.stroke();
      context.fillText(number(v, v % 1 ? 1 : 0), box.left - 6, y(v) + 4);
    }
    context.textAlign = "center";
    context.fillText(spec.x.label, (box.left + box.right) / 2, height - 8);
    context.save(); context.translate(12, (box.top + box.bottom) / 2); context.rotate(-Math.PI / 2); context.fillText(spec.y.label, 0, 0); context.restore();
    for (const bar of spec.bars || []) {
      context.fillStyle = bar.colour;
      context.fillRect(x(bar.from) + 0.5, y(bar.y), Math.max(1, x(bar.to) - x(bar.from) - 1), box.bottom - y(bar.y));
    }
    for (const line of spec.lines || []) {
      context.strokeStyle = line.colour; context.lineWidth = 2.5; context.setLineDash(line.dashed ? [5, 4] : []);
      context.beginPath(); context.moveTo(x(line.from[0]), y(line.from[1])); context.lineTo(x(line.to[0]), y(line.to[1])); context.stroke();
    }
    context.lineWidth = 1; context.setLineDash([]);
    const many = (spec.points || []).length > 400;
    context.globalAlpha = many ? 0.45 : 0.85;
    for (const point of spec.points || []) {
      context.fillStyle = point.colour;
      if (many) { context.fillRect(x(point.x) - 1.5, y(point.y) - 1.5, 3, 3); continue; }
      context.beginPath(); context.arc(x(point.x), y(point.y), point.size || 3.5, 0, 7); context.fill();
    }
    context.globalAlpha = 1;
  }

  moved(event) {
    const box = this.canvas.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let best = null, least = 18;
    for (const point of this.spec.points || []) {
      const away = Math.hypot(this.x(point.x) - px, this.y(point.y) - py);
      if (away < least) [best, least] = [point, away];
    }
    best ||= (this.spec.bars || []).find((bar) => bar.text && px >= this.x(bar.from) && px <= this.x(bar.to));
    if (best?.text) showTip(event, best.text()); else hideTip();
  }
}

function accuracyPlot() {
  const points = [], lines = [];
  const counts = runs.flatMap((run) => Array.from(run.trainCounts));
  runs.forEach((run, r) => {
    const order = ids.slice().sort((a, b) => run.trainCounts[b] - run.trainCounts[a] || a - b);
    const paint = colour(`run${r % 6}`);
    order.forEach((c) => {
      if (!Number.isNaN(run.accuracy[c])) points.push({ x: run.trainCounts[c], y: run.accuracy[c], colour: paint, text: () => `${data.names[c]}${runs.length > 1 ? `, ${run.name}` : ""}\n${percent(run.accuracy[c])} of ${number(run.testCounts[c])} test images\n${number(run.trainCounts[c])} training images` });
    });
    const parts = Math.min(10, numClasses);
    for (let g = 0; g < parts && numClasses > 20; g++) { // mean accuracies of tenths of the classes
      const part = order.slice(Math.round((g * numClasses) / parts), Math.round(((g + 1) * numClasses) / parts)).filter((c) => !Number.isNaN(run.accuracy[c]));
      if (!part.length) continue;
      const mean = part.reduce((sum, c) => sum + run.accuracy[c], 0) / part.length;
      lines.push({ from: [run.trainCounts[part[0]], mean], to: [run.trainCounts[part[part.length - 1]], mean], colour: paint });
    }
  });
  const low = Math.max(1, counts.reduce((a, b) => Math.min(a, b), Infinity) * 0.8), high = counts.reduce((a, b) => Math.max(a, b), 1) * 1.25;
  return { x: { label: "training images of the class", low, high, scale: "log" }, y: { label: "accuracy, per cent", low: 0, high: 103 }, points, lines };
}

function histogramPlot() {
  const values = runs.map((run) => {
    const found = [];
    const { rows, columns, counts } = run.cells;
    for (let i = 0; i < counts.length; i++) if (rows[i] !== columns[i]) found.push((100 * counts[i]) / run.testCounts[rows[i]]);
    return found;
  });
  const largest = Math.max(5, ...values.map((v) => v.reduce((a, b) => Math.max(a, b), 0)));
  const top = Math.ceil(largest / 5) * 5, bins = 25;
  let most = 1;
  const bars = [];
  values.forEach((found, r) => {
    const counted = new Array(bins).fill(0);
    for (const v of found) counted[Math.min(bins - 1, Math.floor((v / top) * bins))]++;
    counted.forEach((n, b) => {
      most = Math.max(most, n);
      const width = top / bins / runs.length, from = (b * top) / bins + r * width;
      if (n) bars.push({ from, to: from + width, y: n, colour: colour(`run${r % 6}`), text: () => `${runs.length > 1 ? runs[r].name + "\n" : ""}${number(n)} ordered pairs with ${number((b * top) / bins, 1)} to ${number(((b + 1) * top) / bins, 1)} % predicted as the other` });
    });
  });
  return { x: { label: "per cent of a class's test images predicted as one other class", low: 0, high: top }, y: { label: "ordered pairs", low: 0.7, high: most * 1.3, scale: "log" }, bars };
}

function relationPlot() {
  const run = runs[0];
  const points = [], paint = colour("run0");
  const add = (r, c) => {
    if (r === c || !run.errors[r] || !run.testCounts[r]) return;
    const [x, y] = [(100 * run.trainedOn(r, c)) / run.errors[r], (100 * run.count(r, c)) / run.testCounts[r]];
    points.push({ x, y, colour: paint, text: () => `${data.names[r]} predicted as ${data.names[c]}\n${percent(x)} of the class's confusions in training (${number(run.trainedOn(r, c))})\n${percent(y)} of its test images` });
  };
  for (let i = 0; i < run.cells.counts.length; i++) add(run.cells.rows[i], run.cells.columns[i]);
  for (let i = 0; i < run.confused.counts.length; i++) if (!run.count(run.confused.rows[i], run.confused.columns[i])) add(run.confused.rows[i], run.confused.columns[i]);
  return { x: { label: "share of the class's confusions in training (CP), per cent", low: 0, high: 100, scale: "root" }, y: { label: "share of its test images, per cent", low: 0, high: 100, scale: "root" }, points };
}

function calibrationPlot() {
  const lines = [{ from: [0, 0], to: [1, 1], colour: colour("quiet"), dashed: true }], points = [];
  runs.forEach((run, r) => {
    const { images, confidence, accuracy } = run.calibration;
    const all = images.reduce((a, b) => a + b, 0);
    images.forEach((n, b) => {
      if (!n) return;
      const text = () => `${runs.length > 1 ? run.name + "\n" : ""}${number(n)} test images\nmean confidence ${confidence[b].toFixed(3)}\naccuracy ${percent(100 * accuracy[b])}`;
      points.push({ x: confidence[b], y: accuracy[b], colour: colour(`run${r % 6}`), size: 3 + 9 * Math.sqrt(n / all), text });
    });
    const filled = images.map((n, b) => b).filter((b) => images[b]);
    for (let k = 1; k < filled.length; k++) lines.push({ from: [confidence[filled[k - 1]], accuracy[filled[k - 1]]], to: [confidence[filled[k]], accuracy[filled[k]]], colour: colour(`run${r % 6}`) });
  });
  return { x: { label: "confidence", low: 0, high: 1 }, y: { label: "accuracy", low: 0, high: 1.02 }, points, lines };
}

// -- all together -----------------------------------------------------------------------------------------------------

function drawScale(canvas, kind, ends) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth || 240, 35];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const paint = palette(kind), inner = width - 30;
  for (let i = 0; i < inner; i++) { context.fillStyle = paint(i / inner); context.fillRect(15 + i, 2, 1.5, 13); }
  context.fillStyle = colour("quiet");
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "center";
  for (const v of ends) {
    const share = kind === "difference" ? 0.5 + (Math.sign(v) * place(v)) / 2 : place(v);
    context.fillText(kind === "difference" ? signed(v).replace(".0", "") : String(v), 15 + share * inner, 29);
  }
}

let plots = [];

function drawAll() {
  maps.forEach((map) => map.draw());
  drawScale($("scale-confusion"), "confusion", [0, 1, 5, 10, 25, 50, 100]);
  if (runs.length > 1) drawScale($("scale-difference"), "difference", [-100, -25, -5, 5, 25, 100]);
  plots.forEach((plot) => plot.draw());
}

function start() {
  if (data.images) document.documentElement.style.setProperty("--sprite", `url(${data.images.sprite})`); // once for all thumbnails
  maps = runs.map((run) => new HeatMap(run.name, run, null));
  for (const other of runs.slice(1)) maps.push(new HeatMap(`${other.name} minus ${runs[0].name}`, other, runs[0]));
  $("maps").replaceChildren(...maps.map((map) => map.figure));
  const again = () => { maps.forEach((map) => map.prepare()); redraw(); showCell(); };
  const change = (id, key, value, then = rearrange) => $(id).addEventListener("change", () => { state[key] = value($(id)); then(); });
  change("order", "order", (e) => e.value);
  change("grouping", "grouping", (e) => e.value);
  change("diagonal", "diagonal", (e) => e.checked, again);
  change("numbers", "numbers", (e) => e.value, again);
  $("zoom-in").addEventListener("click", () => zoom(0.6));
  $("zoom-out").addEventListener("click", () => zoom(1 / 0.6));
  $("zoom-all").addEventListener("click", () => look(0, 0, places.size));
  $("find").addEventListener("focus", () => { // filled on first use: the list is long and rarely needed
    if (!$("names").childElementCount) $("names").append(...data.names.map((name) => element("option", { value: name })));
  });
  const find = () => {
    const wanted = $("find").value.trim().toLowerCase();
    let found = data.names.findIndex((name) => name.toLowerCase() === wanted);
    if (found < 0) found = data.names.findIndex((name) => name.toLowerCase().includes(wanted));
    $("find").setAttribute("aria-invalid", found < 0);
    if (found < 0 || !wanted) return;
    const p = places.placeOf[found];
    look(p - 6, p - 6, Math.min(places.size, 12));
    goTo(p, p);
  };
  $("find").addEventListener("change", find);
  $("find").addEventListener("keydown", (event) => { if (event.key === "Enter") find(); });
  if (runs.length > 1) {
    for (const legend of document.querySelectorAll(".legend")) legend.append(...runs.flatMap((run, r) => [element("span", { className: `key run${r % 6}` }), run.name]));
  }
  rearrange();
  drawAll();
  dark.addEventListener("change", drawAll);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
  setTimeout(() => { // after the matrix is shown: the rest is below the fold
    if ($("plot-relation")) plots.push(new Plot("plot-relation", relationPlot));
    plots.push(new Plot("plot-accuracy", accuracyPlot), new Plot("plot-histogram", histogramPlot), new Plot("plot-calibration", calibrationPlot));
    plots.forEach((plot) => plot.draw());
    pairTable();
    classTable();
    document.documentElement.dataset.ready = "yes";
  });
}

start();
