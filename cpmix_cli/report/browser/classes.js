// -- table of classes -------------------------------------------------------------------------------------------------

function classTable() {
  const share = { text: dash(percent), numeric: true };
  const measures = runs.map((run) => {
    const most = (c) => (run.taken[c].length ? run.taken[c][0].count : 0);
    return [
      { name: "recall", of: ({ c }) => run.recall[c], ...share },
      { name: "95 % interval", of: ({ c }) => run.recall_low[c], numeric: true, links: ({ c }) => [Number.isNaN(run.recall_low[c]) ? "-" : `${rounded(run.recall_low[c], 1)} to ${rounded(run.recall_high[c], 1)}`] },
      { name: "precision", of: ({ c }) => run.precision[c], ...share },
      { name: "F1", of: ({ c }) => run.f1[c], ...share },
      { name: "most taken for, images", of: ({ c }) => most(c), numeric: true, left: true, links: ({ c }) => (run.taken[c].length ? takenLinks(run, c) : ["-"]) },
    ];
  });
  const of = (name, run, isOnly) => (isOnly ? name : `${name}, ${run.name}`);
  const images = (name, key) => { // one column if all runs agree
    const alike = runs.every((run) => ids.every((c) => run[key][c] === runs[0][key][c]));
    return (alike ? runs.slice(0, 1) : runs).map((run) => ({ name: of(name, run, alike), of: ({ c }) => run[key][c], numeric: true }));
  };
  const columns = [
    { name: "class", of: ({ c }) => data.names[c] },
    { name: "group", of: ({ c }) => runs[0].groups[c], text: (v) => GROUPS[v], numeric: true, left: true },
    ...images("training images", "trainCounts"),
    ...images("test images", "testCounts"),
    // of several runs, each measure's columns stand side by side
    ...measures[0].flatMap((_, m) => runs.map((run, r) => ({ ...measures[r][m], name: of(measures[r][m].name, run, runs.length === 1) }))),
  ];
  const rows = ids.map((c) => ({ c, show: () => showInMap(c, runs[0].taken[c].length ? runs[0].taken[c][0].column : c) }));
  sortable($("classes"), columns, rows, ({ c }) => data.names[c], $("classes-search"), 2);
}
