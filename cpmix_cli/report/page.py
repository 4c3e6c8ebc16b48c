"""The page of confusion-report: one self-contained HTML file, no script, nothing fetched."""

import base64
from html import escape

import pandas as pd

STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #f4f4f6; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #202226; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number, th.number { text-align: right; }
thead th { background: var(--soft); vertical-align: bottom; }
figure { margin: 1.5rem 0; overflow-x: auto; }
figure img { max-width: 100%; background: #fff; }

figcaption { margin-top: .4rem; }
"""


def render_page(
    *,
    title: str,
    facts: list[tuple[str, str]],
    accuracy: pd.DataFrame,
    pairs: pd.DataFrame,
    figures: list[tuple[str, bytes]],
) -> str:
    """The page as HTML text; every word of the data is escaped.

    Args:
        title: heading.
        facts: name and value of what the page is about.
        accuracy: one row an evaluation.
        pairs: the most confused pairs, columns as they are to be read.
        figures: caption and PNG.
    """
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    shown = "".join(_figure(caption, png) for caption, png in figures)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{escape(title)}</h1><dl>{listed}</dl>"
        f"<h2>Accuracy</h2>{_table(accuracy, 'Accuracy in per cent')}"
        f"<h2>Pictures</h2>{shown}"
        f"<h2>Most confused pairs</h2>{_table(pairs, 'Pairs of classes, most confused first')}"
        f"</main></body></html>\n"
    )


def _figure(caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _table(table: pd.DataFrame, caption: str) -> str:
    numeric = [_is_number(table[name]) for name in table.columns]
    kinds = [' class="number"' if n else "" for n in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{escape(str(name).strip())}</th>'
        for name, kind in zip(table.columns, kinds, strict=True)
    )
    body = ""
    for row in table.itertuples(index=False):
        cells = [f"<td{kind}>{escape(str(v))}</td>" for v, kind in zip(row, kinds, strict=True)]
        cells[0] = f'<th scope="row">{escape(str(row[0]))}</th>'
        body += f"<tr>{''.join(cells)}</tr>\n"
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _is_number(column: "pd.Series[str]") -> bool:
    """Every cell is a number, a share or a dash."""
    text = column.astype(str).str.replace(r"[ ,.%\-]", "", regex=True)
    return bool(text.str.fullmatch(r"\d*").all())
