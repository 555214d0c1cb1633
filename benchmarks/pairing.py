"""Two devices of a LAN are paired by a person: how long that takes, and what the screens show.

Run from the project's folder, as root: `python -m benchmarks.pairing` (`--picture FILE`: both
terminals as SVG). Two daemons in network namespaces find each other by mDNS; the commands run in
terminals, and are typed as slowly as a person types. Counted from the first key of the first
command until both terminals say who is paired with whom.
"""

from __future__ import annotations

import os
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks.report import Claim, parser, report
from tests.e2e.devices import Device, wait_until
from tests.lan.namespaces import Lan

KEYS_PER_SECOND, READING_SECONDS = 3.0, 4.0  # a thumb on glass; to look at the other screen
HUMAN_REACH, REPEATS, QUICK_REPEATS, WAIT_SECONDS = 30.0, 5, 1, 40.0
WIDTH = 80
_LINE_UP = "\x1b[1A"
_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
_CONTROL = re.compile(r"\x1b\[\??[0-9;]*[A-LN-Za-ln-z]")  # all but colours


class Terminal:
    """A command in a terminal of its own, and all that it shows."""

    def __init__(self, device: Device, *command: str) -> None:
        self._command = f"confidant {' '.join(command)}"
        self._name, self._shown = device.name, ""
        master, slave = pty.openpty()
        environment = {**device.environment(), "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            device.cli_command(*command), stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        self._master = master
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @classmethod
    def typed(cls, device: Device, *command: str) -> Terminal:
        """After the time that it takes a person to type it."""
        time.sleep(len(f"confidant {' '.join(command)}") / KEYS_PER_SECOND)
        return cls(device, *command)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65_536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self._shown += data.decode(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Until it shows this."""
        wanted = re.compile(pattern)
        found = wait_until(lambda: wanted.search(self._shown), WAIT_SECONDS, pattern)
        assert isinstance(found, re.Match)
        return found

    def close(self) -> None:
        """Wait until the command has ended."""
        self._process.wait(WAIT_SECONDS)
        self._thread.join()
        os.close(self._master)

    def screen(self) -> str:
        """What is left on it at the end, with the command in front; colours as they are."""
        lines = [f"{self._name}$ {self._command}"]
        for line in self._shown.replace("\r\n", "\n").split("\n"):
            for _ in range(line.count(_LINE_UP)):
                lines.pop()
            lines.append(_CONTROL.sub("", line.rpartition("\r")[2]))
        return "\n".join(lines).rstrip()


def paired(folder: Path) -> tuple[float, tuple[Terminal, Terminal]]:
    """Seconds of one pairing of two new devices, and both terminals."""
    folder.mkdir()
    with Lan(2) as lan:
        laptop, phone = devices = [
            Device(folder / name, name, prefix=host.prefix, host=host.address)
            for name, host in zip(("laptop", "phone"), lan.hosts, strict=True)
        ]
        try:
            for device in devices:
                device.start()
            began = time.monotonic()
            inviting = Terminal.typed(laptop, "invite")
            code = inviting.wait_for(r"confidant join ([\d-]{11})")[1]
            time.sleep(READING_SECONDS)
            joining = Terminal.typed(phone, "join", code)
            for terminal in (inviting, joining):
                terminal.wait_for(r"paired with")
                terminal.close()
            return time.monotonic() - began, (inviting, joining)
        finally:
            for device in devices:
                if device.process is not None:
                    device.stop()


def claims(repeats: int, picture: Path | None) -> Iterator[Claim]:
    """The median, and a picture of the last one."""
    seconds: list[float] = []
    terminals: tuple[Terminal, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            took, terminals = paired(Path(folder) / str(number))
            seconds.append(took)
    if picture is not None:
        draw(terminals, picture)
    typing = (len("confidant invite") + len("confidant join 123-456-789")) / KEYS_PER_SECOND
    yield Claim(
        "two devices are paired by a code, with typing", statistics.median(seconds), HUMAN_REACH,
        "s", f"{typing:.1f} s of it to type, {READING_SECONDS:.0f} s to look; of {repeats}",
    )  # fmt: skip


def draw(terminals: tuple[Terminal, ...], file: Path) -> None:
    """Both screens, one above the other."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        for terminal in terminals:
            console.print(Text.from_ansi(terminal.screen()))
            console.print()
        drawn = console.export_svg(title="two devices on one Wi-Fi")
    file.write_text(_FONT.sub("", drawn))  # whoever looks at it fetches nothing from elsewhere


if __name__ == "__main__":
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--picture", type=Path, help="an SVG of both terminals")
    given = made.parse_args()
    wanted = QUICK_REPEATS if given.quick else REPEATS
    sys.exit(report(claims(wanted, given.picture), as_json=given.json))
