
// A right-to-left name must not reverse the sentence around it.
const isolated = (name) => (/[\u0590-\u08ff]/.test(name) ? `\u2068${name}\u2069` : name);

// -- one cell in words ------------------------------------------------------------------------------------------------

function describe({ row, column }) {
  const key = row * places.size + column;
  const same = row === column;
  const [from, to] = [isolated(places.labels[row]), isolated(places.labels[column])];
  const verb = !same ? `${from} predicted as ${to}` : places.single ? `${from}, correct` : `${from} predicted as a class of the same group`;
  const found = runs.map((run, r) => {
    const { own } = maps[r];
    const right = same ? places.members[row].reduce((sum, c) => sum + run.count(c, c), 0) : 0;
    return { images: (own.found.get(key) || 0) + (same && !state.diagonal ? right : 0), all: own.totals[row], right };
  });
  const lines = found.map(({ images, all, right }, r) => {
    const share = percent((100 * images) / Math.max(1, all));
    const text = `${number(images)} of ${number(all)} test images (${share})${same && !places.single ? `, ${number(right)} of them correct` : ""}`;
    return runs.length > 1 ? `${runs[r].name}: ${text}` : text;
  });
  const changes = found.slice(1).map((mine, r) => changeInWords(runs[r + 1], mine, found[0], { row, column }));
  return [verb, ...lines, ...changes, ...(places.single ? [trainingLine(places.members[row][0], places.members[column][0])] : [])].join("\n");
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
  return `${number(count)} of ${number(run.errors[a])} wrong predictions of the class, over the epochs`;
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
  panel.append(list, ...(a === b ? mostTakenFor(a) : testImages(a, b)));
  if (state.pinned) panel.append(element("p", { className: "quiet screen-only", textContent: "This cell is pinned: Escape, or a click on it, lets it go." }));
}

// Return links to the cells of the classes that a class is most taken for.
function mostTakenFor(c) {
  return runs.filter((run) => run.taken[c].length).map((run) => element("p", {}, `${runs.length > 1 ? `${run.name}, ` : ""}most taken for: `, ...takenLinks(run, c)));
}

// -- test images of a cell --------------------------------------------------------------------------------------------

const imagesOf = new Map(); // cell -> indices of its thumbnails, which are of the first run
if (data.images) {
  const [rows, columns] = [decode(data.images.true_class), decode(data.images.predicted_class)];
  rows.forEach((row, i) => {
    const key = row * numClasses + columns[i];
    if (!imagesOf.has(key)) imagesOf.set(key, []);
    imagesOf.get(key).push(i);
  });
}

// Return the elements that show the misclassified images of a cell, and how to list those that the page leaves out.
function testImages(row, column) {
  const all = runs[0].count(row, column);
  if (!data.images || !all) return [];
  const found = imagesOf.get(row * numClasses + column) || [];
  const said = (textContent) => element("p", { className: "quiet", textContent });
  const shown = [];
  if (found.length) {
    const which = found.length < all ? `the ${found.length} most confident of ${number(all)} images` : "its images";
    const names = found.map((i) => data.images.names[i]);
    const copy = element("button", { type: "button", textContent: `copy the list of ${data.images.are_files ? "files" : "images"}` });
    copy.addEventListener("click", () => copyNames(copy, names));
    shown.push(said(`${which}${runs.length > 1 ? ` of ${runs[0].name}` : ""}, with the confidence:`), element("ul", { className: data.images.are_files ? "thumbs files" : "thumbs" }, ...found.map((_, at) => thumbnail(found, at, row, column))), copy);
  } else shown.push(said("The page has images of the most confused cells only, not of this one."));
  if (found.length < all && data.images.listing) {
    const named = (c) => (data.names[c].includes("\\") ? c : shellQuoted(data.names[c])); // the page has other letters than such a name: its id does
    const classes = `--true ${named(row)} --predicted ${named(column)}`;
    const words = `cpmix misclassified --from ${runFolder()} ${data.images.listing} ${classes} --limit ${all}`.split(" ").flatMap((textContent) => [element("span", { textContent }), " "]);
    shown.push(said(all > 1 ? `This lists all ${number(all)}:` : "This names it:"), element("code", {}, ...words)); // broken at words, not after hyphens
  }
  return shown;
}

const shellQuoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

// Return the folder of the run, if the page is where it was written: in RUN/confusion/ or RUN/confusion/PHASE-LABEL/.
function runFolder() {
  const [, folder] = location.href.match(/^file:\/\/(.*)\/confusion\/(?:[^/]+\/)?index\.html(?:#|$)/) || [];
  try {
    return shellQuoted(decodeURIComponent(folder || "RUN"));
  } catch { return "RUN"; } // the name is not UTF-8
}

function thumbnail(found, at, row, column) {
  const { columns, side, width, height, names, confidence } = data.images;
  const scale = 64 / side, i = found[at];
  const button = element("button", { type: "button", className: side < 64 ? "thumb few-pixels" : "thumb", title: "enlarge", "aria-label": `enlarge ${names[i]}` });
  button.style.backgroundSize = `${width * scale}px ${height * scale}px`;
  button.style.backgroundPosition = `${-(i % columns) * 64}px ${-Math.floor(i / columns) * 64}px`;
  button.addEventListener("click", () => enlarge(found, at, row, column));
  return element("li", {}, button, element("span", {}, names[i], element("br"), element("b", { textContent: percent(confidence[i]) })));
}

let sheet = null; // promise of the contact sheet as an image

// Open the larger view of one of the found images; buttons and arrow keys lead to the others, round and round.
function enlarge(found, at, row, column) {
  const { columns, side, names, confidence, sprite } = data.images;
  const dialog = $("enlarged"), canvas = dialog.querySelector("canvas");
  const buttons = document.querySelectorAll(".thumb");
  if (!sheet) {
    const image = element("img", { src: sprite });
    sheet = image.decode().then(() => image);
  }
  canvas.width = canvas.height = side * Math.floor(288 / side); // whole pixels become whole squares
  canvas.className = side < 64 ? "few-pixels" : "";
  const show = (wanted) => {
    at = (wanted + found.length) % found.length;
    const i = found[at];
    const facts = { "true class": data.names[row], "predicted class": data.names[column], confidence: percent(confidence[i]) };
    $("enlarged-name").textContent = names[i];
    $("enlarged-facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
    $("enlarged-place").textContent = `${at + 1} of ${found.length}`;
    sheet.then((image) => {
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = side >= 64;
      context.drawImage(image, (i % columns) * side, Math.floor(i / columns) * side, side, side, 0, 0, canvas.width, canvas.height);
    });
  };
  const steps = { ArrowLeft: -1, ArrowRight: 1 };
  dialog.onkeydown = (event) => { if (steps[event.key]) show(at + steps[event.key]); };
  $("enlarged-previous").onclick = () => show(at - 1);
  $("enlarged-next").onclick = () => show(at + 1);
  $("enlarged-close").onclick = () => dialog.close();
  dialog.onclose = () => buttons[at].focus();
  $("enlarged-previous").hidden = $("enlarged-next").hidden = found.length === 1;
  show(at);
  dialog.showModal();
}

async function copyNames(button, names) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(names.join("\n"));
  } catch { // no permission, or a page that is neither a file nor of https
    const text = element("textarea", { className: "only-read", value: names.join("\n") });
    document.body.append(text);
    text.select();
    copied = document.execCommand("copy");
    text.remove();
    button.focus();
  }
  const words = copied ? `copied ${names.length} ${names.length > 1 ? "names" : "name"}` : "the browser does not allow to copy";
  button.textContent = $("spoken").textContent = words;
}
