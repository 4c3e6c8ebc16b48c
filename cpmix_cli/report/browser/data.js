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
function rounded(value, places = 0) { // as percent() of runtime/rounding.py, so that a number reads the same everywhere
  const scale = 10 ** places, whole = Math.floor(Math.abs(value) * scale + 0.5 + 1e-7);
  return (value < 0 && whole ? "-" : "") + (whole / scale).toFixed(places);
}
const percent = (value) => `${rounded(value, value > 0 && value < 1 ? 2 : 1)} %`;
function signed(value, places = 1) {
  const text = rounded(value, places);
  return value > 0 && Number(text) ? `+${text}` : text;
}
const counted = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
// A name as one may type it: pickup truck for Pickup_Truck.
const plain = (name) => name.trim().toLowerCase().replace(/[\s_-]+/g, " ");
const $ = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");
const onPaper = () => document.documentElement.classList.contains("on-paper"); // while the browser prints
const isDark = () => dark.matches && !onPaper();
const pixelRatio = () => (onPaper() ? 3 : window.devicePixelRatio || 1); // for about 300 dots per inch

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

const MOST_TAKEN = 3;

// Return for each true class the predicted classes that most of its images are taken for, most images first.
function takenFor(run) {
  const found = data.names.map(() => []);
  const { rows, columns, counts } = run.cells;
  for (let i = 0; i < counts.length; i++) if (rows[i] !== columns[i]) found[rows[i]].push({ column: columns[i], count: counts[i] });
  return found.map((wrong) => wrong.sort((a, b) => b.count - a.count || a.column - b.column).slice(0, MOST_TAKEN));
}

const takenLinks = (run, c) => run.taken[c].flatMap(({ column, count }, k) => [k ? ", " : "", element("a", { href: `#cell-${c}-${column}`, textContent: data.names[column] }), ` ${number(count)}`]);

for (const run of runs) {
  run.taken = takenFor(run);
  run.testCounts = sums(run.cells, run.cells.rows);
  run.predicted = sums(run.cells, run.cells.columns);
  run.count = lookup(run.cells);
  for (const [name, values] of Object.entries(run.classes)) run[name] = Array.from(decode(values), (v) => (v < 0 ? NaN : v / 1e5));
  if (run.confused) {
    run.errors = decode(run.errors);
    run.trainedOn = lookup(run.confused);
  }
}
