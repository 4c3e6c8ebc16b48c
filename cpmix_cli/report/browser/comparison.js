// -- differences in words ---------------------------------------------------------------------------------------------

// Return what the colours and numbers of a map of differences are.
function differenceInWords(run, first) {
  return `How many more (+) or fewer (-) of the row's test images ${run.name} predicts so than ${first.name}, in points. `
    + "Blue is better: more on the diagonal, fewer elsewhere. Orange is worse.";
}

// Return how a compared run differs from the first one in a cell. Both have {images, all}: of the row's test images, those predicted so.
function changeInWords(run, mine, first, { row, column }) {
  if (!mine.all || !first.all) return `${run.name}: not compared, as one run has no test images of the class`;
  const paired = mine.all === first.all;
  const change = paired ? mine.images - first.images : (100 * mine.images) / mine.all - (100 * first.images) / first.all;
  if (!change) return `${run.name}: no difference`;
  const [from, to] = [isolated(places.labels[row]), isolated(places.labels[column])];
  const much = `${paired ? number(Math.abs(change)) : rounded(Math.abs(change), 1)}${paired ? "" : " points"} ${change > 0 ? "more" : "fewer"}`;
  const images = `${much} of ${paired ? counted(mine.all, "image") : "the images"} of ${from}`;
  const said = row !== column ? `predicts ${images} as ${to}` : places.single ? `is right on ${images}` : `predicts ${images} as a class of the same group`;
  return `${run.name} ${said}: ${change > 0 === (row === column) ? "better" : "worse"}`;
}
