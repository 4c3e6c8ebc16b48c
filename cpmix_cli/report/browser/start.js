// -- all together -----------------------------------------------------------------------------------------------------

function drawScale(canvas, kind, ends) {
  const ratio = pixelRatio();
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
    context.fillText(number(Math.abs(v)), 15 + share * inner, 29); // of a difference: worse to the left, better to the right
  }
}

// A table that is larger than its box is a region that the keyboard reaches and scrolls.
const fits = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  const box = target.closest(".wide");
  const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
  const given = { tabindex: "0", role: "region", "aria-label": box.querySelector("caption").textContent };
  for (const [name, value] of Object.entries(given)) scrolls ? box.setAttribute(name, value) : box.removeAttribute(name);
}));

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
  const differences = runs.slice(1).map((run) => new HeatMap(`${run.name} minus ${runs[0].name}`, run, runs[0]));
  maps.push(...differences);
  const [first, ...others] = maps.map((map) => map.figure);
  $("maps").replaceChildren(first, ...differences.flatMap((map, r) => [others[r], map.figure])); // each difference follows its run
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
    const wanted = plain($("find").value);
    let found = data.names.findIndex((name) => plain(name) === wanted);
    if (found < 0) found = data.names.findIndex((name) => plain(name).includes(wanted));
    $("find").setAttribute("aria-invalid", found < 0);
    $("not-found").hidden = found >= 0;
    if (found < 0 || !wanted) return;
    ungroup();
    const p = places.placeOf[found];
    look(p - 6, p - 6, Math.min(places.size, 12));
    goTo(p, p);
    $("cell").scrollIntoView({ block: "nearest" });
  };
  $("find").addEventListener("change", find);
  $("find").addEventListener("keydown", (event) => { if (event.key === "Enter") find(); });
  if (runs.length > 1) {
    for (const legend of document.querySelectorAll(".legend")) legend.append(...runs.flatMap((run, r) => [element("span", { className: `key run${r % 6}` }), run.name]));
  }
  $("order").value = state.order;
  rearrange();
  if (data.opens) { // the most confused cell, with its card filled
    const [row, column] = data.opens.map((c) => places.placeOf[c]);
    Object.assign(state, { cursor: { row, column }, pinned: true });
    showCell();
  }
  drawAll();
  addEventListener("hashchange", followLink);
  document.addEventListener("click", (event) => { // the same link again is no change of the address
    if (event.target.closest?.("a[href^='#cell-']")?.hash === location.hash) followLink();
  });
  dark.addEventListener("change", drawAll);
  for (const event of ["beforeprint", "afterprint"]) {
    addEventListener(event, () => {
      document.documentElement.classList.toggle("on-paper", event === "beforeprint");
      drawAll();
    });
  }
  document.querySelectorAll(".wide, .wide table").forEach((part) => fits.observe(part));
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
  setTimeout(() => { // after the matrix is shown: the rest is below the fold
    if ($("plot-relation")) plots.push(new Plot("plot-relation", relationPlot));
    plots.push(new Plot("plot-accuracy", accuracyPlot), new Plot("plot-histogram", histogramPlot), new Plot("plot-calibration", calibrationPlot));
    plots.forEach((plot) => plot.draw());
    pairTable();
    classTable();
    followLink();
    document.documentElement.dataset.ready = "yes";
  });
}

start();
