"""The page of confusion-report: one self-contained HTML file that fetches nothing.

The folder browser/ holds the template, the style and the scripts, which the page has as one script in the order of
_SCRIPTS. The content security policy allows only the page's own script and style, so no name in the data can run or
load anything.
"""

import base64
import hashlib
import html
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cpmix_cli.data.longtail import GROUPS
from cpmix_cli.evaluation.per_class import class_columns, totals
from cpmix_cli.report.changes import gains_and_losses, moved_errors, verdict
from cpmix_cli.report.colours import KINDS, MODES, stops
from cpmix_cli.report.findings import Finding, find
from cpmix_cli.report.images import ContactSheet
from cpmix_cli.report.pairs import relation, trim_confusions
from cpmix_cli.runtime.errors import counted
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import on_a_line

Array = NDArray[Any]
GENERATOR = b'<meta name="generator" content="cpmix">'
"""Line of page.html by which a page of cpmix is told from others."""

_SCRIPTS = ("data", "layout", "comparison", "matrix", "cell", "tables", "classes", "plots", "start")
"""Parts of the script: each uses only those before it while it loads."""
_MAX_PAIRS = 200_000  # training confusions on the page; above that, trim_confusions() selects


@dataclass(frozen=True)
class ShownRun:
    """Data of one run that the page shows; C classes."""

    name: str
    lead: str
    """A sentence: what was trained on what."""
    facts: list[tuple[str, str]]
    """Name and value of each line below the accuracies."""
    class_counts: Array
    """Training images [C]."""
    groups: list[str]
    """many, medium or few [C]."""
    matrix: Array
    """Test images [C, C]."""
    confusions: Array | None
    """Confusion counts K of the training [C, C]; None if none were collected."""
    reliability: Array
    """Images, mean confidence and accuracy per confidence bin [15, 3]."""
    alone: tuple[Array, Array] | None = None
    """Test images per class that only this run gets right [C], and only the first [C]; None: not of the same images."""


def render_page(
    *,
    title: str,
    runs: list[ShownRun],
    class_names: list[str],
    notes: list[str],
    accuracy: pd.DataFrame,
    pairs: pd.DataFrame,
    named_pairs: pd.DataFrame,
    clustered: Array,
    images: ContactSheet | None,
    pictures: list[tuple[str, list[str]]],
    embedded: list[tuple[str, bytes]],
) -> str:
    """Return the page as HTML text; every word of the data is escaped.

    Args:
        title: heading of the page.
        runs: the run, then the runs that it is compared with, all of the same C classes.
        class_names: C names.
        notes: paragraphs below the table of accuracies.
        accuracy: table with a row per evaluation.
        pairs: confused_pairs() of the sum of all runs' matrices.
        named_pairs: the first of these pairs with names and headings, shown without JavaScript.
        clustered: class ids [C], ordered so that classes confused with each other are adjacent.
        images: thumbnails of the first run's cells; None: no thumbnails.
        pictures: caption and addresses of each figure's files, relative to the page.
        embedded: caption and PNG of each figure inside the page.
    """
    frame, script, style = _parts()
    findings = find(runs[0].matrix, runs[0].class_counts, class_names)
    data = {
        "names": [on_a_line(name) for name in class_names],
        "runs": [_run_data(run) for run in runs],
        "pairs": {name: pairs[name].to_numpy() for name in ("rarer_class", "commoner_class")},
        "clustered": clustered,
        "opens": [findings[0].true_class, findings[0].predicted_class] if findings else None,
        "images": None if images is None else vars(images),
        "colours": {kind: {mode: stops(kind, mode) for mode in MODES} for kind in KINDS},
    }
    sources = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:"
    several = len(runs) > 1
    return string.Template(frame).substitute(
        policy=f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'",
        title=escape(title),
        style=style,
        compared=" compared" if several else "",
        comparison=_comparison(runs, class_names) if several else "",
        summary="\n".join(_summary(run, named=several) for run in runs),
        findings=_findings(findings, of=runs[0].name if several else ""),
        facts="\n".join(_facts(run, named=several) for run in runs),
        accuracy=_table(accuracy, "Per cent", "accuracy"),
        notes="".join(f"<p>{escape(note)}</p>" for note in notes),
        difference='<span><canvas id="scale-difference"></canvas>difference in points: worse, better</span>'
        if several
        else "",
        pairs=_table(named_pairs, "Pairs of classes with any confusion", "pairs"),
        classes=_table(pd.DataFrame({"class": []}), "Classes", "classes"),
        relation="" if runs[0].confusions is None else _relation(runs[0], named=several),
        reliability=escape("; ".join(_reliability_in_words(run) for run in runs)),
        embedded="".join(_picture(caption, png) for caption, png in embedded),
        of_first=f", of {escape(runs[0].name)}" if several else "",
        pictures="\n".join(_links(caption, places) for caption, places in pictures),
        data=json.dumps(data, separators=(",", ":"), allow_nan=False, default=_int32).replace("<", "\\u003c"),
        script=script,
    )


def escape(text: str) -> str:
    """Escape a text for HTML, and what on_a_line() escapes."""
    return html.escape(on_a_line(text))


def page_digest() -> str:
    """Return the hash of the page's template, script and style. A page with another hash is rebuilt."""
    return _hash("".join(_parts()))


def _parts() -> list[str]:
    browser = resources.files("cpmix_cli.report") / "browser"
    scripts = [(browser / f"{name}.js").read_text("utf-8") for name in _SCRIPTS]
    return [(browser / "page.html").read_text("utf-8"), "".join(scripts), (browser / "page.css").read_text("utf-8")]


def _hash(text: str) -> str:
    """Return the source expression of an inline script or style in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _int32(values: Array) -> str:
    """Encode an array of integers for JSON: base64 of little-endian int32."""
    return base64.b64encode(np.asarray(values, dtype="<i4").tobytes()).decode()


def _cells(matrix: Array) -> dict[str, Array]:
    true, predicted = np.nonzero(matrix)
    return {"true_class": true, "predicted_class": predicted, "count": matrix[true, predicted]}


def _run_data(run: ShownRun) -> Mapping[str, Any]:
    images, confidence, accuracy = np.nan_to_num(run.reliability).T.tolist()
    kept = run.confusions
    if kept is not None and np.count_nonzero(kept) > _MAX_PAIRS:
        kept = trim_confusions(kept, run.matrix)
    return {
        "name": on_a_line(run.name),
        "train_counts": run.class_counts,
        "groups": np.array([GROUPS.index(group) for group in run.groups]),
        "matrix": _cells(run.matrix),
        "confusion_pairs": None if kept is None else _cells(kept),
        "classes": _class_data(run.matrix),
        "errors": None if run.confusions is None else run.confusions.sum(1),
        "trimmed": kept is not run.confusions,
        "calibration": {"images": images, "confidence": confidence, "accuracy": accuracy},
    }


def _class_data(matrix: Array) -> dict[str, Array]:
    """Return the numbers of each class in units of 0.00001 per cent [C]; -1 where they are undefined."""
    found = class_columns(matrix)
    columns = {name: found[name] for name in ("precision", "f1", "recall_low", "recall_high")}
    return {
        name: np.nan_to_num(np.rint(1e5 * v), nan=-1) for name, v in {"recall": found["accuracy"], **columns}.items()
    }


def _comparison(runs: list[ShownRun], names: list[str]) -> str:
    """Return what changes from the first run to each other one, and where the errors of all are."""
    first, *others = runs
    sections = "".join(_against(first, other, names) for other in others)
    if first.confusions is None:
        return sections
    words, rows = moved_errors([run.matrix for run in runs], first.confusions)
    header = ["run", "on pairs that training confused most", "on all other pairs"]
    table = pd.DataFrame([[run.name, *row] for run, row in zip(runs, rows, strict=True)], columns=header)
    return (
        f'{sections}<section class="changes"><h2>What moved</h2>'
        f"<p>Wrong predictions on the pairs that training confused most: {escape(words)} of {escape(first.name)}.</p>"
        f"{_table(table, 'Wrong test images, and per cent of all test images', 'moved')}</section>"
    )


def _against(first: ShownRun, other: ShownRun, names: list[str]) -> str:
    called = other.name, first.name
    said, *more = verdict(first.matrix, other.matrix, other.alone, first.groups, called)
    lists = gains_and_losses(first.matrix, other.matrix, first.class_counts, first.groups, names)
    titles = {"better": "Classes that gain most", "worse": "Classes that lose most"}
    changes = "".join(
        f'<div class="{kind}"><h3>{title}</h3>{_linked(found, "ul") or "<p>None.</p>"}</div>'
        for (kind, title), found in zip(titles.items(), lists, strict=True)
    )
    return (
        f'<section class="changes"><h2>{escape(" against ".join(called))}</h2><p>{escape(said)}</p>'
        f'<p class="quiet">{escape(" ".join(more))}</p>'
        f"<p>Test images that are recognised, from {escape(first.name)} to {escape(other.name)}:</p>"
        f'<div class="both">{changes}</div></section>'
    )


def _summary(run: ShownRun, *, named: bool) -> str:
    """Return the run's balanced accuracy with its interval, and a bar of the accuracy of each group."""
    recall = class_columns(run.matrix)["accuracy"]
    intervals = totals(run.matrix, run.groups)["intervals"]
    rows = "".join(
        _group(group, recall[members], run.class_counts[members], intervals[group])
        for group in GROUPS
        if (members := np.array(run.groups) == group).any()
    )
    return (
        f'<section class="summary">{f"<h2>{escape(run.name)}</h2>" if named else ""}<p>{escape(run.lead)}</p>'
        f'<div class="headline"><p><strong>{percent(float(np.nanmean(recall)), 1)} %</strong> balanced accuracy<br>'
        f'<span class="quiet">95 % interval {_ends(intervals["balanced_accuracy"])}. The mean of the recalls of all '
        "classes, so that rare ones count as much as frequent ones.</span></p>"
        '<div class="wide"><table class="groups"><caption>Accuracy by group of classes, with 95 % intervals</caption>'
        f"<tbody>{rows}</tbody></table></div></div></section>"
    )


def _group(name: str, recall: Array, counts: Array, interval: list[float] | None) -> str:
    """Return the table row of a group: a bar of its accuracy, the interval, and which classes it has."""
    share, ends = "-", ""
    if interval is not None:
        mean = float(np.nanmean(recall))
        share, ends = f"{percent(mean, 1)} %{_bar(mean, *interval, kind=name)}", _ends(interval)
    images = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
    noun = "training image" if counts.max() == 1 else "training images"
    cells = [share, ends, f"{counted(len(counts), 'class', 'classes')} with {images} {noun}"]
    return f'<tr data-group="{name}"><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _ends(interval: list[float]) -> str:
    return f"{percent(interval[0], 1)} to {percent(interval[1], 1)} %"


def _bar(share: float, low: float, high: float, *, kind: str) -> str:
    """Return a bar from 0 to 100 per cent with its interval as an SVG; its numbers stand beside it."""
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="{kind}" width="{share:.2f}" height="10"/>'
        f'<rect class="whisker" x="{low:.2f}" y="4" width="{high - low:.2f}" height="2"/></svg>'
    )


def _findings(findings: list[Finding], *, of: str) -> str:
    if not findings:
        return "<p>No test image is predicted wrong.</p>"
    return f"<h2>Findings{f', {escape(of)}' if of else ''}</h2>{_linked(findings, 'ol')}"


def _linked(findings: list[Finding], kind: str) -> str:
    """Return a list, ol or ul, of sentences that lead to their cells; "" if there are none."""
    items = "".join(
        f'<li><a href="#cell-{found.true_class}-{found.predicted_class}">{escape(found.text)}</a></li>'
        for found in findings
    )
    return items and f'<{kind} class="findings">{items}</{kind}>'


def _facts(run: ShownRun, *, named: bool) -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in run.facts)
    return f"{f'<h3>{escape(run.name)}</h3>' if named else ''}<dl>{listed}</dl>"


def _relation(run: ShownRun, *, named: bool) -> str:
    assert run.confusions is not None
    found, size = relation(run.confusions, run.matrix), len(run.class_counts)
    words = f"Training confused {found['num_pairs']:,} of {size * (size - 1):,} ordered pairs of classes"
    if found["num_top"]:
        words += f", including {found['top_in_training']:,} of the test's {found['num_top']:,} most confused pairs"
    words += "."
    if found["num_classes"]:
        words += (
            f" For {found['same_first']:,} of {found['num_classes']:,} classes the most frequent confusion is the same."
            " The wrong predictions of a class in training and test overlap by "
            f"{percent(100 * found['overlap'])} per cent."
        )
    words = escape(f"{run.name}: {words}" if named else words)
    return (
        "<figure><h3>Confusion pairs in training (CP) and confusions in the test"
        f"{escape(f', {run.name}') if named else ''}</h3>"
        f'<canvas id="plot-relation" role="img" aria-label="{words}"></canvas><figcaption>{words}</figcaption></figure>'
    )


def _reliability_in_words(run: ShownRun) -> str:
    images, confidence, accuracy = run.reliability[run.reliability[:, 0] > 0].T
    mean = 100 * np.average(np.stack([confidence, accuracy]), axis=1, weights=images)
    return f"{run.name}: mean confidence {percent(mean[0], 1)} per cent, accuracy {percent(mean[1], 1)} per cent"


def _links(caption: str, places: list[str]) -> str:
    links = (f'<a href="{escape(place)}">{escape(place.rpartition("/")[2])}</a>' for place in places)
    return f"<li>{escape(caption)} {', '.join(links)}</li>"


def _picture(caption: str, png: bytes) -> str:
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(table: pd.DataFrame, caption: str, name: str) -> str:
    kinds = [' class="number"' if _is_number(table[column]) else "" for column in table.columns]
    titled = zip(table.columns, kinds, strict=True)
    head = "".join(f'<th scope="col"{kind}>{escape(str(column).strip())}</th>' for column, kind in titled)
    body = ""
    for row in table.itertuples(index=False):
        cells = [f"<td{kind}>{escape(str(v))}</td>" for v, kind in zip(row, kinds, strict=True)]
        cells[0] = f'<th scope="row">{escape(str(row[0]))}</th>'
        body += f"<tr>{''.join(cells)}</tr>\n"
    return (
        f'<div class="wide"><table id="{name}" data-caption="{escape(caption)}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _is_number(column: "pd.Series[str]") -> bool:
    """Return whether every cell is a number, a percentage or a dash."""
    return bool(len(column)) and bool(column.astype(str).str.fullmatch(r"[\d ,.%\-]*").all())
