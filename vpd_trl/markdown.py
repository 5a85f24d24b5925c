"""Text of any kind within Markdown: no name, value or completion may break a table or forge a heading."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


# What Markdown and HTML leave as it is, also within a table
_PLAIN = re.compile(r"[\w.,:;/@+\-=()' ]+")


def one_line(text: str) -> str:
    """Text with its line breaks and other control characters made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def code(text: str) -> str:
    """Text as code in a line or in a cell of a table."""
    text = one_line(str(text)).strip() or " "
    if _PLAIN.fullmatch(text):
        return f"`{text}`"
    return f"<code>{_entities(text)}</code>"


def plain(text: str) -> str:
    """Text in a line, without any meaning for Markdown or HTML."""
    return _entities(one_line(str(text)).strip())


def cell(text: str) -> str:
    """Text in a cell of a table, with its line breaks."""
    lines = str(text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "<br>".join(_entities(one_line(line)) for line in lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already, each one line without a bare `|`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _entities(text: str) -> str:
    """Every character that Markdown or HTML could read as markup, as an entity."""
    return re.sub(r"[|`*_\[\]\\~#!$]", lambda m: f"&#{ord(m[0])};", html.escape(text, quote=False))
