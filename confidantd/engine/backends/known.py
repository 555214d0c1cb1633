"""The plugins of this project, for a device that lacks one: whom it is for, how to get it."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import confidantd

_INTEL = {"x86_64", "amd64"}
_ARM = {"aarch64", "arm64"}


@dataclass(frozen=True, slots=True)
class KnownPlugin:
    """A backend's name, the hardware it is for, and where there are builds of its provider.

    `systems` are values of `sys.platform`; `machines` processors, all if empty.
    """

    name: str
    hardware: str
    systems: frozenset[str]
    machines: frozenset[str] = frozenset()

    def fits_here(self) -> bool:
        """Whether this system and processor can have it at all."""
        if sys.platform not in self.systems:
            return False
        return not self.machines or platform.machine().lower() in self.machines

    def install(self) -> str:
        """What to type; the plugins are not on the package index but beside our sources."""
        folder = Path(confidantd.__file__).parents[1] / "plugins" / self.name
        if folder.is_dir():
            return f"pip install {folder}"
        return f"in the source folder of Confidant: pip install ./plugins/{self.name}"


PLUGINS = (
    KnownPlugin(
        "openvino",
        "x86-64 processors, Intel graphics and NPUs",
        frozenset({"linux", "win32"}),
        frozenset(_INTEL),
    ),
    KnownPlugin("webgpu", "any graphics processor", frozenset({"linux", "win32", "darwin"})),
    KnownPlugin("cuda", "NVIDIA graphics processors", frozenset({"linux", "win32"})),
    KnownPlugin("qnn", "Snapdragon NPUs", frozenset({"linux", "win32"}), frozenset(_ARM)),
    KnownPlugin("coreml", "Apple graphics", frozenset({"darwin"})),
    KnownPlugin("nnapi", "accelerators of Android phones", frozenset({"android"})),
    KnownPlugin("xnnpack", "Arm processors of phones", frozenset({"android"})),
)
