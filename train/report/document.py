"""What the pages share: one HTML document that needs nothing beside itself, with its style, sections and tables."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from data.io.files import write_utf8
from train.errors import UserError

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--bad:#d9434e}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1240px;padding:1.5rem}
h1{margin:0;font-size:1.5rem}h1 small{font-weight:400;opacity:.65}
h2{margin:2rem 0 .6rem;font-size:1.15rem;border-bottom:1px solid var(--line)}
.facts{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:.6rem 0}.facts b{display:block;font-size:1.15rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(380px,1fr));gap:1rem}
figure{margin:0;padding:.6rem;background:var(--soft);border-radius:.5rem;min-width:0}
figcaption{font-weight:600;font-size:.9rem;padding:0 .2rem .3rem}
svg{width:100%;height:auto;display:block;font-family:system-ui,sans-serif}
svg *{stroke-linejoin:round;stroke-linecap:butt}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .8rem;text-align:right;
border-bottom:1px solid var(--line)}th:first-child,td:first-child,.words{text-align:left}
th{font-size:.85rem;opacity:.75}tr.best td{font-weight:600}
i.key{display:inline-block;width:.8em;height:.8em;margin-right:.5em;border-radius:2px}
img,video{max-width:100%;image-rendering:pixelated;border-radius:.3rem}.wide{overflow-x:auto}
pre{overflow-x:auto;background:var(--soft);padding:.8rem;border-radius:.5rem;font-size:.82rem}
.bad{color:var(--bad)}.mask{max-width:32rem}
"""


def write_document(title: str, parts: Sequence[str], out: Path) -> Path:
    """Writes a page, whole or not at all.

    Args:
        parts: HTML, in order.

    Raises:
        UserError: the file cannot be written.
    """
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    try:
        write_utf8(out, page)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give out=<a file>") from error
    return out


def section(title: str, content: str) -> str:
    """A part of the page under its heading; empty without content."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names with their values in a row, as text."""
    cells = "".join(f"<div>{html.escape(name)}<b>{html.escape(value)}</b></div>" for name, value in pairs)
    return f'<div class="facts">{cells}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML; the first column stands on the left."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'
