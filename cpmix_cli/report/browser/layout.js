// -- order of classes -------------------------------------------------------------------------------------------------

const ids = Array.from({ length: numClasses }, (_, c) => c);
const ORDERS = {
  count: () => ids.slice().sort((a, b) => runs[0].trainCounts[b] - runs[0].trainCounts[a] || a - b),
  confusion: () => Array.from(decode(data.clustered)),
  recall: () => { // classes without test images last
    const of = (c) => (runs[0].testCounts[c] ? runs[0].recall[c] : -1);
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
