"""A picture (SVG) of one training step over the devices: as planned, and as it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from confidantd.cli.output import duration, plain

WIDTH, LEFT, ROW, GAP = 960, 150, 26, 34
CHART = WIDTH - LEFT - 20
COLOURS = {"forward": "#3b82c4", "backward": "#e08a3c", "step": "#5aa469"}
INK, PAPER, IDLE = "#1f2933", "#ffffff", "#eef1f4"


@dataclass(frozen=True, slots=True)
class Bar:
    """What a stage does from `start` to `end`, in seconds."""

    kind: str
    microbatch: int
    start: float
    end: float


Rows = Sequence[Sequence[Bar]]


def draw(fields: Mapping[str, Any]) -> str:
    """A chart of the planned step and, if there was one, of a measured one, on one scale.

    `fields`: what the daemon says of a job's `names`, `predicted` and `measured` steps.
    """
    names = [plain(name) for name in fields["names"]]
    charts = [("predicted", _rows(fields["predicted"]))]
    if fields["measured"]:
        title = "measured, the last step, each device by its own clock"
        charts.append((title, _rows(fields["measured"])))
    longest = max((bar.end for _, rows in charts for row in rows for bar in row), default=0.0)
    scale = CHART / max(longest, 1e-9)
    body, y = [], 12
    for title, rows in charts:
        seconds = max((bar.end for row in rows for bar in row), default=0.0)
        y += GAP - 10
        body.append(_text(12, y, f"{title}: {duration(seconds)}", bold=True))
        y += 12
        for name, row in zip(names, rows, strict=True):
            body += _row(name, row, y, seconds, scale)
            y += ROW
        y += 10
    body += _legend(y)
    height = y + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _rows(spans: Sequence[Sequence[Mapping[str, Any]]]) -> Rows:
    return [
        [Bar(str(s["kind"]), int(s["microbatch"]), s["start"], s["end"]) for s in row]
        for row in spans
    ]


def _row(name: str, bars: Sequence[Bar], y: float, seconds: float, scale: float) -> Iterator[str]:
    """One stage: what it does, and in between that it waits."""
    height = ROW - 6
    yield _text(12, y + height - 5, name[:20])
    whole = f'width="{seconds * scale:.1f}" height="{height}"'
    yield f'<rect x="{LEFT}" y="{y}" {whole} fill="{IDLE}"/>'
    for bar in bars:
        x, width = LEFT + bar.start * scale, (bar.end - bar.start) * scale
        colour = COLOURS.get(bar.kind, INK)
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{height}" '
            f'fill="{colour}" stroke="{PAPER}" stroke-width="0.5"/>'
        )
        if width > 16 and bar.kind != "step":
            yield (
                f'<text x="{x + width / 2:.1f}" y="{y + height - 5}" text-anchor="middle" '
                f'fill="{PAPER}">{bar.microbatch + 1}</text>'
            )


def _legend(y: float) -> Iterator[str]:
    x = float(LEFT)
    for kind, colour in COLOURS.items():
        yield f'<rect x="{x}" y="{y + 4}" width="12" height="12" fill="{colour}"/>'
        label = "optimizer" if kind == "step" else kind
        yield _text(x + 18, y + 14, label)
        x += 110
    yield _text(x, y + 14, "numbers: microbatches")


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{weight}>{escape(text)}</text>'
