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
  const columns = [
    { name: "class", of: ({ c }) => data.names[c] },
    { name: "group", of: ({ c }) => runs[0].groups[c], text: (v) => GROUPS[v], numeric: true, left: true },
    { name: "training images", of: ({ c }) => runs[0].trainCounts[c], numeric: true },
    { name: "test images", of: ({ c }) => runs[0].testCounts[c], numeric: true },
    // of several runs, each measure's columns stand side by side
    ...measures[0].flatMap((_, m) => runs.map((run, r) => ({ ...measures[r][m], name: runs.length > 1 ? `${measures[r][m].name}, ${run.name}` : measures[r][m].name }))),
  ];
  const rows = ids.map((c) => ({ c, show: () => showInMap(c, runs[0].taken[c].length ? runs[0].taken[c][0].column : c) }));
  sortable($("classes"), columns, rows, ({ c }) => data.names[c], $("classes-search"), 2);
}
