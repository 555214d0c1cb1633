"""Temperature of the processor and the battery, from the kernel's files; nothing is waited for.

Files are chosen by the names of their sensors before one is read: drives, Wi-Fi cards and the
board have sensors too, and to read a drive's one may wake it. On phones an app may read only
some of these files, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Chips of `hwmon` and types of `thermal_zone`: Intel, AMD, boards, Qualcomm, MediaTek, Exynos.
# Qualcomm's zone `soc` is none of them: it is the battery's state of charge.
_PROCESSOR = re.compile(
    r"cpu|coretemp|k8temp|k10temp|zenpower|x86_pkg_temp|soc[-_]thermal|tsens|^(big|mid|little)$",
    re.IGNORECASE,
)
_BATTERY = re.compile(r"batt|^bat\d*$", re.IGNORECASE)
# What unconnected and broken sensors report lies outside: 0, -40, 127.5, 255.
COLDEST_CELSIUS, HOTTEST_CELSIUS = 0.0, 126.0


def hottest(root: Path = Path("/sys/class")) -> tuple[float | None, float | None]:
    """Degrees Celsius of the processor and of the battery, the hottest sensor of each."""
    processor: list[float] = []
    battery: list[float] = []
    for name, path in _sensors(root):
        found = battery if _BATTERY.search(name) else processor
        if found is battery or _PROCESSOR.search(name):
            value = _celsius(_text(path))
            if value is not None:
                found.append(value)
    return max(processor, default=None), max(battery, default=None)


def _sensors(root: Path) -> Iterator[tuple[str, Path]]:
    """Names of sensors and the files with their values."""
    for chip in _folders(root / "hwmon"):
        name = _text(chip / "name")
        yield from ((name, path) for path in chip.glob("temp*_input"))
    for zone in _folders(root / "thermal"):
        yield _text(zone / "type"), zone / "temp"
    for supply in _folders(root / "power_supply"):
        if _text(supply / "type") == "Battery":
            yield "battery", supply / "temp"


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # no such class here, or Android denies it
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # denied, or a sensor that cannot be read now
        return ""


def _celsius(text: str) -> float | None:
    """Degrees of what a kernel writes: thousandths, tenths (batteries) or whole ones (old)."""
    try:
        value = float(int(text))
    except ValueError:
        return None
    if abs(value) >= 1000:
        value /= 1000
    elif abs(value) > HOTTEST_CELSIUS:
        value /= 10
    return plausible(value)


def plausible(celsius: float) -> float | None:
    """The temperature, None if it cannot be one."""
    return celsius if COLDEST_CELSIUS < celsius < HOTTEST_CELSIUS else None
