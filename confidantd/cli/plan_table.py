"""A plan, and what its choices cost, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from confidantd.cli.output import cell, duration, plain, size
from confidantd.cli.tables import backend_shares, table

BAR_CELLS = 10
ALIKE = 0.02  # predictions are not better than that

Fields = Mapping[str, Any]


def plan(fields: Fields) -> RenderableType:
    """`confidant plan`, and the plan of a job when it starts."""
    return Group(
        _stages(fields),
        Text(_what_is_timed(fields), style="dim"),
        *(Text(line, style="dim") for line in _guesses(fields["stages"])),
        *(Text(line, style=style) for line, style in _backends(fields["stages"])),
        *map(Text, _links(fields)),
        *(Text(line, style="yellow") for line in _left_out(fields["left_out"])),
        *map(Text, _choices(fields)),
        *(Text(line, style="dim") for line in _instead(fields)),
        *(Text(line, style="cyan") for line in _fewer_devices(fields)),
        Text(_predicted(fields), style="bold"),
    )


def _trains(fields: Fields) -> bool:
    return bool(fields.get("objective", "train") == "train")


def _stages(fields: Fields) -> Table:
    unit = "microbatch" if _trains(fields) else "token"
    made = table("device", "layers", "ends", "memory", "of", unit, right=(unit,))
    for stage in fields["stages"]:
        first, past_last = stage["layers"]
        ends = [name for name in ("embedding", "head") if stage[name]]
        made.add_row(
            cell(stage["name"], cut=True),
            cell(f"{first}-{past_last - 1}" if past_last > first else ""),
            cell(", ".join(ends)),
            _bar(stage["memory_bytes"], stage.get("available_bytes")),
            cell(size(stage.get("available_bytes"))),
            cell(duration(stage["seconds"])),
        )
    return made


def _bar(used: int, cap: int | None) -> Text:
    share = min(1.0, used / cap) if cap else 0.0
    full = round(share * BAR_CELLS)
    style = "green" if share < 0.8 else "yellow"
    bar = Text("█" * full, style=style)
    bar.append("·" * (BAR_CELLS - full), style="dim")
    return bar.append(f" {size(used)}")


def _what_is_timed(fields: Fields) -> str:
    """What the times in the table are of."""
    if not _trains(fields):
        return "token: what the device computes for one token of one request"
    rows, count = fields.get("microbatch_size"), fields.get("microbatches")
    of = f" of {rows} x {fields['sequence_length']} tokens; a step has {count}" if rows else ""
    return f"microbatch: forward and backward of one{of}"


def _guesses(stages: Iterable[Fields]) -> Iterator[str]:
    """Whose times are no measurements."""
    names = [plain(stage["name"]) for stage in stages if stage.get("measured") is False]
    if names:
        yield f"not measured with such blocks yet, estimated by GFLOP/s: {', '.join(names)}"


def _backends(stages: Iterable[Fields]) -> Iterator[tuple[str, str]]:
    """Lines, and their style, for the devices that have more than the CPU."""
    for stage in stages:
        name, shares = plain(stage["name"]), stage["backends"]
        if [share["name"] for share in shares] not in ([], ["cpu"]):
            yield f"{name}: {backend_shares(shares)}", ""
        if stage.get("unmeasured_backends"):
            others = ", ".join(plain(other) for other in stage["unmeasured_backends"])
            yield f"{name}: {others} are measured when the job starts", "dim"
        if stage.get("cpu_only"):
            yield f"{name}: the CPU only, there is no memory for other providers", "dim"


def _links(fields: Fields) -> Iterator[str]:
    names = {stage["device"]: stage["name"] for stage in fields["stages"]}
    whole, each = ("step", "microbatch") if _trains(fields) else (_whole(fields), "token")
    for link in fields["links"]:
        ends = f"{names.get(link['from'], '?')} → {names.get(link['to'], '?')}"
        seconds = duration(link["seconds"])
        yield f"link {plain(ends)}: {size(link['bytes'])} a {whole}, {seconds} a {each} each way"


def _whole(fields: Fields) -> str:
    """What the predicted seconds are of."""
    if _trains(fields):
        return "step"
    return "round" if fields["objective"] == "serve" else "token"


def _left_out(devices: Iterable[Fields]) -> Iterator[str]:
    for left in devices:
        yield f"left out {plain(left.get('name') or left['device'][:8])}: {plain(left['reason'])}"


def _choices(fields: Fields) -> Iterator[str]:
    """What the choices within the stages cost."""
    whole = fields["predicted"]["step_seconds"]
    for stage in fields.get("recomputing", ()):
        more = 100 * (whole / stage["seconds"] - 1)
        short = size(stage["short_bytes"])
        name = plain(stage["name"])
        yield f"recompute on {name}: +{more:.0f} % (saved does not fit by {short})"
    others = fields.get("other_microbatches", ())
    if others:
        said = ", ".join(_other_count(other, whole) for other in others)
        count = fields["microbatches"]
        yield f"{count} microbatch{'es' if count > 1 else ''}: {said}"


def _other_count(other: Fields, whole: float) -> str:
    count, seconds = other["microbatches"], other["seconds"]
    if seconds is None:
        return f"{count} would not fit on these devices"
    more = seconds / whole - 1
    if abs(more) <= ALIKE:
        return f"{count} would take about as long"
    return f"{count} would take {100 * abs(more):.0f} % {'longer' if more > 0 else 'less'}"


def _instead(fields: Fields) -> Iterator[str]:
    for other in fields.get("alternatives", ()):
        names = plain(", ".join(other["devices"]))
        note = "; the text would leave its device" if _text_leaves(other, fields) else ""
        yield f"instead: {names}: {_pace(other['seconds'], fields)}{note}"


def _text_leaves(other: Fields, fields: Fields) -> bool:
    """Whether that is what speaks against a plan that is faster."""
    faster = other["seconds"] < fields["predicted"]["step_seconds"]
    return bool(faster and other.get("text_leaves"))


def _fewer_devices(fields: Fields) -> Iterator[str]:
    """That fewer devices are faster, where that is so."""
    used = [stage["name"] for stage in fields["stages"]]
    mine = _pace(fields["predicted"]["step_seconds"], fields)
    faster = fields.get("faster")
    if faster is not None:
        better = _pace(faster["seconds"], fields)
        yield f"{_named(faster['devices'])} would be faster: {better}; --devices insists on {mine}"
        return
    for other in fields.get("alternatives", ()):
        more = [name for name in other["devices"] if name not in used]
        slower = other["seconds"] > fields["predicted"]["step_seconds"]
        if slower and len(other["devices"]) > len(used) and set(used) <= set(other["devices"]):
            theirs = _pace(other["seconds"], fields)
            yield f"{_named(used)} {_are(used)} fastest: {mine}; with {_list(more)} {theirs}"
            return


def _named(names: Sequence[str]) -> str:
    return f"{plain(names[0])} alone" if len(names) == 1 else _list(names)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _list(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    shown = [plain(name) for name in names]
    return " and ".join([*([", ".join(shown[:-1])] if shown[:-1] else []), shown[-1]])


def _pace(seconds: float, fields: Fields) -> str:
    """How fast a plan is, in what its objective counts."""
    if fields.get("objective") == "serve":
        return f"{fields['load'] / seconds:.3g} tokens/s"
    return f"{duration(seconds)} a {_whole(fields)}"


def _predicted(fields: Fields) -> str:
    predicted = fields["predicted"]
    seconds, rate = predicted["step_seconds"], f"{predicted['tokens_per_second']:.3g} tokens/s"
    if fields.get("objective") == "serve":
        each = duration(seconds)
        return f"predicted: {rate} over {fields['load']} requests, each a token every {each}"
    return f"predicted: {duration(seconds)} a {_whole(fields)}, {rate}"
