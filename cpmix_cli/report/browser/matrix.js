// -- the heat maps ----------------------------------------------------------------------------------------------------

const state = { order: numClasses > 30 ? "confusion" : "count", grouping: "classes", diagonal: true, numbers: "percent", row0: 0, column0: 0, span: numClasses, cursor: null, pinned: false };
let places = null;
let maps = [];

function palette(kind) {
  const stops = data.colours[kind][isDark() ? "dark" : "light"];
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
    if (against) this.figure.append(element("figcaption", { textContent: differenceInWords(run, against) }));
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
    if (!this.other) return this.own.percent(key);
    const row = Math.floor(key / places.size);
    return this.own.totals[row] && this.other.totals[row] ? this.own.percent(key) - this.other.percent(key) : 0;
  }

  draw() {
    const ratio = pixelRatio();
    const width = this.canvas.clientWidth || 600;
    const context = this.canvas.getContext("2d");
    const { span, row0, column0 } = state;
    context.font = "12px system-ui, sans-serif";
    // The margin fits the names, up to a quarter of the width. Names are left out if their lines would be too close.
    const longest = Math.max(...this.inView(row0, Math.min(span, 200)).map((p) => context.measureText(places.labels[p]).width));
    // Beyond the right and the lower edge stand the groups, if the order has them; beyond the names, the titles of the axes.
    const far = grouped() ? STRIP : 8;
    let margin = Math.min(width / 4, STRIP + 8 + longest);
    const named = (width - margin - far) / span >= 7;
    if (!named) margin = STRIP + 6;
    const side = width - margin - far;
    const cell = side / span;
    Object.assign(this, { margin, side, cell });
    const height = margin + side + far;
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
    this.drawTitles(context);
    this.drawGroups(context);
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
      if (!value || row < state.row0 - 1 || row > state.row0 + state.span || column < state.column0 - 1 || column > state.column0 + state.span) continue;
      const better = row === column ? value : -value; // more is better on the diagonal, fewer is off it
      const fill = this.other ? diverging(0.5 + (Math.sign(better) * place(value)) / 2) : sequential(place(value));
      context.fillStyle = fill;
      context.fillRect(this.x(column), this.y(row), drawn - gap, drawn - gap);
      if (cell >= 26) {
        context.fillStyle = luminance(fill) > 0.179 ? "#000" : "#fff"; // the better contrast: both have 4.58 : 1 there
        const shown = this.words(row, column, value);
        context.font = `${Math.min(13, (1.4 * cell) / Math.max(3, shown.length))}px system-ui, sans-serif`;
        context.fillText(shown, this.x(column) + cell / 2, this.y(row) + cell / 2);
      }
    }
  }

  // Return the text in a cell: test images, or per cent of the row's; of a difference, with its sign.
  words(row, column, value) {
    const images = (cells) => cells.found.get(row * places.size + column) || 0;
    if (!this.other) return state.numbers === "images" ? number(images(this.own)) : value >= 1 ? rounded(value) : "<1";
    const paired = this.own.totals[row] === this.other.totals[row]; // else only shares can be compared
    return state.numbers === "images" && paired ? signed(images(this.own) - images(this.other), 0) : signed(value);
  }

  drawLines(context) {
    if (!grouped()) return;
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
    context.strokeStyle = colour("quiet"); // lines, because a shade would change the colours below it
    context.globalAlpha = 0.6;
    context.strokeRect(this.margin - 1, this.y(row), this.side + 2, Math.max(1, this.cell));
    context.strokeRect(this.x(column), this.margin - 1, Math.max(1, this.cell), this.side + 2);
    context.globalAlpha = 1;
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
    const room = this.margin - STRIP - 6;
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

  drawTitles(context) {
    const middle = this.margin + this.side / 2;
    const titles = this.side > 220 ? ["predicted class", "true class"] : ["predicted", "true"];
    this.drawBeside(context, titles[0], middle, STRIP / 2 - 1, false);
    this.drawBeside(context, titles[1], STRIP / 2 - 1, middle, true);
  }

  drawGroups(context) {
    if (!grouped()) return;
    const edge = this.margin + this.side + STRIP / 2;
    for (const [name, first, end] of groupSpans()) {
      for (const upright of [false, true]) {
        const start = upright ? state.row0 : state.column0;
        const from = Math.max(first, start), to = Math.min(end, start + state.span);
        const middle = upright ? this.y((from + to) / 2) : this.x((from + to) / 2);
        if (context.measureText(name).width + 4 > (to - from) * this.cell) continue;
        this.drawBeside(context, name, upright ? edge : middle, upright ? middle : edge, upright);
      }
    }
  }

  drawBeside(context, text, x, y, upright) {
    context.save();
    context.fillStyle = colour("quiet");
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.translate(x, y);
    if (upright) context.rotate(-Math.PI / 2);
    context.fillText(text, 0, 0);
    context.restore();
  }

  // Return the words on the group of classes whose label is pointed at, or null.
  groupAt(event) {
    if (!grouped()) return null;
    const [x, y] = this.within(event);
    const [right, below] = [x >= this.side, y >= this.side];
    if (right === below || Math.min(x, y) < 0) return null;
    const p = Math.floor(right ? y / this.cell + state.row0 : x / this.cell + state.column0);
    const span = groupSpans().find(([, first, end]) => p >= first && p < end);
    return span ? groupInWords(span[0], right) : null;
  }

  within(event) { // pixels from the upper left corner of the cells
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left - this.margin, event.clientY - box.top - this.margin];
  }

  at(event) {
    const [x, y] = this.within(event);
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
    const tip = cell ? describe(cell) : this.groupAt(event);
    if (tip) showTip(event, tip); else hideTip();
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

const STRIP = 20; // pixels of a title of an axis, and of a label of a group

const grouped = () => places.orderName === "count" && places.single;

// Return which classes a group has, as the first screen says it, and what its rows or columns are.
function groupInWords(name, asRows) {
  const classes = document.querySelector(`[data-group="${name}"]`).lastElementChild.textContent;
  return `${name}: ${classes}\n${asRows ? "Rows: images of these classes." : "Columns: images predicted as these classes."}`;
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
  const channel = (at) => { // of sRGB, as WCAG 2 defines it
    const value = parseInt(hex.slice(at, at + 2), 16) / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  };
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

// Select the cell of two classes, true and predicted, scroll to it and to its card, and move the focus to the card.
function showInMap(row, column) {
  ungroup();
  goTo(places.placeOf[row], places.placeOf[column]);
  requestAnimationFrame(() => { // when the map is drawn, the cell has its place
    const [map] = maps, panel = $("cell");
    const top = map.canvas.getBoundingClientRect().top + map.y(state.cursor.row);
    if (top < 80 || top > innerHeight - 120) scrollBy({ top: top - innerHeight * 0.4 });
    const card = panel.getBoundingClientRect();
    if (card.top < 0 || card.top > innerHeight - 160) panel.scrollIntoView({ block: card.height < innerHeight ? "nearest" : "start" });
    panel.focus({ preventScroll: true });
  });
}

// Show single classes, which all but a choice of groups speak of.
function ungroup() {
  if (places.single) return;
  $("grouping").value = state.grouping = "classes";
  rearrange();
}

// A link to #cell-TRUE-PREDICTED, with class ids, selects that cell.
function followLink() {
  const [, row, column] = location.hash.match(/^#cell-(\d+)-(\d+)$/) || [];
  if (column !== undefined && Math.max(row, column) < numClasses) showInMap(Number(row), Number(column));
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
  else if (event.key === "Escape") { state.pinned = false; state.cursor = null; hideTip(); redraw(); showCell(); $("spoken").textContent = "nothing is selected"; }
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
  const kept = places?.single && state.pinned ? [state.cursor.row, state.cursor.column].map((p) => places.members[p][0]) : null;
  places = layout(state.order, state.grouping);
  maps.forEach((map) => map.prepare());
  state.pinned = Boolean(kept && places.single); // the same classes in their new places
  state.cursor = state.pinned ? { row: places.placeOf[kept[0]], column: places.placeOf[kept[1]] } : null;
  look(0, 0, places.size);
  showCell();
}
