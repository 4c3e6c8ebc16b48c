
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
