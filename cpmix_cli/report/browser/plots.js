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
    const ratio = pixelRatio();
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
    const words = Math.min(width - 4, context.measureText(spec.x.label).width); // below the plot, or as far left as they need
    context.fillText(spec.x.label, Math.min((box.left + box.right) / 2, width - 2 - words / 2), height - 8, width - 4);
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
      if (!Number.isNaN(run.recall[c])) points.push({ x: run.trainCounts[c], y: run.recall[c], colour: paint, text: () => `${data.names[c]}${runs.length > 1 ? `, ${run.name}` : ""}\n${percent(run.recall[c])} of ${number(run.testCounts[c])} test images\n${number(run.trainCounts[c])} training images` });
    });
    const parts = Math.min(10, numClasses);
    for (let g = 0; g < parts && numClasses > 20; g++) { // mean accuracies of tenths of the classes
      const part = order.slice(Math.round((g * numClasses) / parts), Math.round(((g + 1) * numClasses) / parts)).filter((c) => !Number.isNaN(run.recall[c]));
      if (!part.length) continue;
      const mean = part.reduce((sum, c) => sum + run.recall[c], 0) / part.length;
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
      const text = () => `${runs.length > 1 ? run.name + "\n" : ""}${number(n)} test images\nmean confidence ${rounded(confidence[b], 3)}\naccuracy ${percent(100 * accuracy[b])}`;
      points.push({ x: confidence[b], y: accuracy[b], colour: colour(`run${r % 6}`), size: 3 + 9 * Math.sqrt(n / all), text });
    });
    const filled = images.map((n, b) => b).filter((b) => images[b]);
    for (let k = 1; k < filled.length; k++) lines.push({ from: [confidence[filled[k - 1]], accuracy[filled[k - 1]]], to: [confidence[filled[k]], accuracy[filled[k]]], colour: colour(`run${r % 6}`) });
  });
  return { x: { label: "confidence", low: 0, high: 1 }, y: { label: "accuracy", low: 0, high: 1.02 }, points, lines };
}
