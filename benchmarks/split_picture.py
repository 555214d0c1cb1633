"""A picture of which backend computed which heads and columns, and what that gained (SVG)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from benchmarks.split_shapes import Shape

WIDTH, BAR, LEFT, LINE = 760, 460, 190, 22
COLOURS = ("#3b82c4", "#e08a3c", "#5aa469", "#a05195")
INK, PAPER, GREY = "#1f2933", "#ffffff", "#c4ccd4"


def draw(shapes: Sequence[Shape]) -> str:
    """One panel a width: shares of heads and columns, then times beside each other."""
    body: list[str] = []
    top = 16
    for hidden in dict.fromkeys(shape.hidden for shape in shapes):
        found = [shape for shape in shapes if shape.hidden == hidden]
        panel = list(_panel(hidden, found, top))
        body += [line for line, _ in panel]
        top = panel[-1][1] + 2 * LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{top}" fill="{PAPER}"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _panel(hidden: int, shapes: Sequence[Shape], top: int) -> Iterator[tuple[str, int]]:
    """SVG elements with the height reached."""
    y = top + LINE
    yield _text(12, y, f"hidden {hidden}: who computes what of a block", bold=True), y
    shares = shapes[0].shares
    for label, index in (("attention heads", 0), ("MLP columns", 1)):
        y += LINE + 4
        yield _text(12, y, label), y
        total, x = sum(share[index] for share in shares.values()), float(LEFT)
        for place, (name, share) in enumerate(shares.items()):
            width = BAR * share[index] / total
            yield _bar(x, y, width, COLOURS[place], f"{name}: {share[index]}"), y
            x += width
    y += LINE + 14
    yield _text(12, y, "time, forward and backward (ms)", bold=True), y
    for shape in shapes:
        longest = max(*shape.single_seconds.values(), shape.torch_seconds)
        rows = [*shape.single_seconds.items(), ("torch", shape.torch_seconds)]
        rows.append(("both", shape.split_seconds))
        y += 8
        for place, (name, seconds) in enumerate(rows):
            y += LINE
            colour = GREY if name == "torch" else COLOURS[min(place, len(COLOURS) - 1)]
            colour = COLOURS[2] if name == "both" else colour
            gain = f", {shape.gain:.2f}x the better one" if name == "both" else ""
            yield _text(12, y, f"{shape.unit}: {name}"), y
            label = f"{1e3 * seconds:.0f}{gain}"
            yield _bar(LEFT, y, BAR * seconds / longest, colour, label), y


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{weight}>{escape(text)}</text>'


def _bar(x: float, y: float, width: float, colour: str, label: str) -> str:
    """A bar with its label inside, or behind it where it is short."""
    inside = width > 9 * len(label)
    place, ink = (x + 6, PAPER) if inside else (x + width + 6, INK)
    if colour == GREY:
        ink = INK
    return (
        f'<rect x="{x:.1f}" y="{y - 14:.0f}" width="{max(width, 1):.1f}" height="18" '
        f'fill="{colour}"/><text x="{place:.1f}" y="{y:.0f}" fill="{ink}">{escape(label)}</text>'
    )
