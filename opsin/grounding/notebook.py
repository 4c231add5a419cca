"""Answers as notebooks show them: tables as tables, lines as lines, and nothing that runs."""

from __future__ import annotations

import base64

from opsin.grounding.layout import Layout, safe_table


def markdown(text: str) -> str:
    """A model's text as Markdown: its own Markdown and tables, each of its lines a line.

    Of HTML only a table's tags stay; any other bracket is text.
    """
    lines: list[str] = []
    fence = ""
    for line in text.splitlines():
        bare = line.strip()
        if fence:
            fence = "" if bare.startswith(fence) else fence
            lines.append(line)
            continue
        if bare.startswith(("```", "~~~")):
            fence = bare[:3]
            lines.append(line)
            continue
        # Two spaces at its end make a line of Markdown a line; a table's rows must not have them.
        ends = "" if not bare or bare.startswith(("|", "<", "#")) else "  "
        lines.append(safe_table(line.rstrip()) + ends)
    return "\n".join(lines)


def page(layout: Layout, picture: bytes | None) -> str:
    """A page that was read as HTML: the picture (PNG) with its parts drawn, then its text."""
    shown = ""
    if picture is not None:
        data = base64.b64encode(picture).decode()
        shown = f'<img style="max-width:100%" src="data:image/png;base64,{data}">\n'
    return shown + layout.to_html()
