// -- tables that sort -------------------------------------------------------------------------------------------------

// columns: {name, of(row) -> string or number, numeric?, text?(value) -> string, links?(row) -> nodes instead of it, left?: a number that is shown as text}.
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
    const wanted = plain(search.value);
    const { of, numeric } = columns[state.by];
    const sign = state.down ? -1 : 1;
    const chosen = wanted ? rows.filter((row) => plain(matches(row)).includes(wanted)) : rows.slice();
    chosen.sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      if (!numeric) return sign * x.localeCompare(y, "en", { numeric: true });
      return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y);
    });
    body.replaceChildren(...chosen.slice(0, state.shown).map((row) => {
      const line = element("tr", {}, ...columns.map(({ of, text, links, numeric, left }, i) => {
        const value = of(row);
        const cell = element(i ? "td" : "th", { className: numeric && !left ? "number" : "" });
        const shown = element("span", { className: numeric && !left ? "" : "name", textContent: text ? text(value) : numeric ? number(value) : value });
        if (links) shown.replaceChildren(...links(row));
        if (i) cell.append(shown);
        else {
          cell.setAttribute("scope", "row");
          cell.append(element("button", { type: "button" }, shown)); // its click reaches the row's listener
        }
        return cell;
      }));
      line.addEventListener("click", (event) => { if (!event.target.closest("a")) row.show?.(); });
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

const dash = (text) => (value) => (Number.isNaN(value) ? "-" : text(value));

function pairTable() {
  const [rarer, frequent] = [decode(data.pairs.rarer_class), decode(data.pairs.commoner_class)];
  const together = (row, column) => runs.reduce((sum, run) => sum + run.count(row, column), 0);
  const larger = (r, c) => (together(r, c) >= together(c, r) ? [r, c] : [c, r]); // the direction with more confusions
  const rows = Array.from(rarer, (r, i) => ({ r, c: frequent[i], show: () => showInMap(...larger(r, frequent[i])) }));
  const both = (run) => ({ r, c }) => run.count(r, c) + run.count(c, r);
  const columns = [
    { name: "rarer class", of: ({ r }) => data.names[r] },
    { name: "training images", of: ({ r }) => runs[0].trainCounts[r], numeric: true },
    { name: "more frequent class", of: ({ c }) => data.names[c] },
    { name: "its training images", of: ({ c }) => runs[0].trainCounts[c], numeric: true },
  ];
  const named = (run) => (runs.length > 1 ? `, ${run.name}` : "");
  for (const run of runs) columns.push({ name: `confusions${named(run)}`, of: both(run), numeric: true });
  for (const run of runs.slice(1)) columns.push({ name: `change, ${run.name}`, of: (row) => both(run)(row) - both(runs[0])(row), text: (v) => signed(v, 0), numeric: true });
  for (const run of runs) {
    const name = named(run);
    columns.push({ name: `rarer as more frequent${name}`, of: ({ r, c }) => run.count(r, c), numeric: true });
    // With equally many training images neither class is the rarer one.
    const share = ({ r, c }) => (runs[0].trainCounts[r] < runs[0].trainCounts[c] ? (100 * run.count(r, c)) / both(run)({ r, c }) : NaN);
    columns.push({ name: `rarer as more frequent, %${name}`, of: share, text: dash((v) => rounded(v)), numeric: true });
    if (run.confused) columns.push({ name: `in training${name}`, of: ({ r, c }) => run.trainedOn(r, c) + run.trainedOn(c, r), numeric: true });
  }
  sortable($("pairs"), columns, rows, ({ r, c }) => `${data.names[r]} ${data.names[c]}`, $("pairs-search"), 4);
}
