"""Settings of the daemon: `HOME/config.toml`, then the environment, then flags."""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import platform
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import platformdirs

from confidantd.errors import ConfigError

ENVIRONMENT_PREFIX = "CONFIDANT_"
CONFIG_NAME = "config.toml"
# Whether other programs on a device keep it from work.
WhenInUse = Literal["share", "decline"]
# Whether backends share blocks: where it is faster, always, or never.
Split = Literal["auto", "always", "never"]
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_NAME_CHARACTERS = 64
MAX_HOME_BYTES = 90  # with `/control.sock` it stays under the 104 bytes of a socket's path
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """How one daemon runs. `port` None: the one of last time, or any free one.

    `memory_bytes` and `threads` cap what jobs may use here; None: what there is.
    `backends` are the execution providers that jobs may use, all that work if there are
    none; `split` says whether they share blocks: where it is faster, always, or never.

    When this device takes work for others: its battery is not below `least_battery_percent`,
    or it charges; it charges, with `only_when_charging`; no sensor of processor or battery is
    above `most_celsius` (None: processors slow down by themselves before they suffer) and the
    battery's not above `most_battery_celsius` (45: chargers cut their current above it, and
    cells age faster); other programs do not use it, with `when_in_use = "decline"`. Jobs that are
    started on this device use it in any case. `battery_command` prints what the battery does,
    as `termux-battery-status` does: for a UPS that the system does not know.

    Models that are served answer programs of this device on `api_port` (None: 8377, or any free
    one), those that show `api_key` where one is set.
    """

    home: Path
    name: str
    port: int | None = None
    hosts: tuple[str, ...] = ("0.0.0.0",)  # noqa: S104 - the peers are on the network
    peers: tuple[str, ...] = ()
    mdns: bool = True
    memory_bytes: int | None = None
    threads: int | None = None
    backends: tuple[str, ...] = ()
    split: Split = "auto"
    log_level: str = "info"
    least_battery_percent: float = 20.0
    only_when_charging: bool = False
    most_celsius: float | None = None
    most_battery_celsius: float = 45.0
    when_in_use: WhenInUse = "share"
    battery_command: str = ""
    api_port: int | None = None
    api_key: str = ""


SETTINGS = tuple(field.name for field in fields(DaemonConfig) if field.name != "home")


def default_home(environment: Mapping[str, str]) -> Path:
    """`$CONFIDANT_HOME`, else the platform's folder for a user's data."""
    named = environment.get(ENVIRONMENT_PREFIX + "HOME")
    return Path(named) if named else platformdirs.user_data_path("confidant")


def load_config(flags: Mapping[str, Any], environment: Mapping[str, str]) -> DaemonConfig:
    """The settings; `ConfigError` names a wrong one. Flags that are None or () were not given."""
    home = _home(Path(flags.get("home") or default_home(environment)).absolute())
    settings: dict[str, Any] = {"name": _default_name()}
    settings |= _from_file(home / CONFIG_NAME)
    settings |= _from_environment(environment)
    for name in SETTINGS:
        given = flags.get(name)
        if given is not None and given != ():
            settings[name] = given
    return DaemonConfig(home=home, **{name: _checked(name, settings[name]) for name in settings})


def parse_size(text: str) -> int:
    """Bytes of a size like `512M`, `2G` or `1.5GiB` (all powers of 1024)."""
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(f"{text[:40]!r} is not a size", "write it like 512M or 2G")
    number, unit, _ = match.groups()
    return int(float(number) * 1024 ** _POWERS[unit.upper()])


def _default_name() -> str:
    """The host's name without its domain."""
    return platform.node().split(".")[0][:MAX_NAME_CHARACTERS] or "device"


def _from_file(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as failure:
        raise ConfigError(f"{path} cannot be read ({failure})", "correct or remove it") from None
    for key in found:
        _require_known(key, str(path), SETTINGS)
    return found


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name in SETTINGS:
        value = environment.get(ENVIRONMENT_PREFIX + name.upper())
        if value is None:
            continue
        listed = name in ("hosts", "peers", "backends")
        found[name] = tuple(value.replace(",", " ").split()) if listed else value
    return found


def _require_known(key: str, where: str, known: tuple[str, ...]) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean `{near[0]}`?" if near else f"known settings: {', '.join(known)}"
    raise ConfigError(f"{where}: there is no setting `{key[:60]}`", hint)


def _checked(name: str, value: Any) -> Any:
    """The value in its own type; None stays None where a setting may be absent."""
    if value is None and name in ("port", "threads", "memory_bytes", "most_celsius", "api_port"):
        return None
    return _CHECKS[name](name, value)


def _home(path: Path) -> Path:
    """The control socket's path must fit what the kernel takes (104 bytes on the strictest)."""
    if len(os.fsencode(path)) > MAX_HOME_BYTES:
        raise ConfigError(
            f"the home's path is longer than {MAX_HOME_BYTES} bytes, too long for a socket in it",
            "choose a shorter --home",
        )
    return path


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"`{name}` must be a list of texts")
    return tuple(value)


def _key(name: str, value: Any) -> str:
    if isinstance(value, str) and value.isascii() and value.isprintable():
        return value
    raise ConfigError(f"`{name}` must be printable ASCII")


def _split(name: str, value: Any) -> Split:
    return cast("Split", _one_of(name, value, get_args(Split)))


def _when_in_use(name: str, value: Any) -> WhenInUse:
    return cast("WhenInUse", _one_of(name, value, get_args(WhenInUse)))


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value in known:
        return cast("str", value)
    raise ConfigError(f"`{name}` cannot be {value!r:.40}", f"known: {', '.join(known)}")


def _hosts(name: str, value: Any) -> tuple[str, ...]:
    hosts = _texts(name, value)
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ConfigError(
                f"{host[:60]!r} is not an IP address", "give one of this device to --host"
            ) from None
    if not hosts:
        raise ConfigError("`hosts` must name one address at least", "0.0.0.0 means all")
    return hosts


def _log_level(name: str, value: Any) -> str:
    if str(value).lower() not in LOG_LEVELS:
        raise ConfigError(f"`{name}` must be one of {', '.join(LOG_LEVELS)}")
    return str(value).lower()


def _port(name: str, value: Any) -> int:
    return _whole(name, value, 0, 65_535)


def _threads(name: str, value: Any) -> int:
    return _whole(name, value, 1, 4_096)


def _name(_: str, value: Any) -> str:
    text = str(value).strip()
    if not text or len(text) > MAX_NAME_CHARACTERS or not text.isprintable() or "," in text:
        raise ConfigError(f"the name {text[:40]!r} cannot be used", "use 1 to 64 plain characters")
    return text


def _whole(name: str, value: Any, least: int, most: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"`{name}` must be a whole number") from None
    if not least <= number <= most or isinstance(value, bool | float):
        raise ConfigError(f"`{name}` must be a whole number from {least} to {most}")
    return number


def _memory(name: str, value: Any) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    amount = int(value) if whole else parse_size(str(value))
    if amount <= 0:
        raise ConfigError(f"`{name}` must be over 0", "write it like 512M or 2G")
    return amount


def _percent(name: str, value: Any) -> float:
    return _number(name, value, 0, 100)


def _degrees(name: str, value: Any) -> float:
    return _number(name, value, 1, 150)


def _number(name: str, value: Any, least: float, most: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not least <= number <= most:
        raise ConfigError(f"`{name}` must be a number from {least:g} to {most:g}")
    return number


def _command(name: str, value: Any) -> str:
    """A command line whose program is here, or an empty text for none."""
    try:
        words = shlex.split(value) if isinstance(value, str) else None
    except ValueError:
        words = None
    if words is None:
        raise ConfigError(f"`{name}` must be a command line", "close every quote in it")
    if words and shutil.which(words[0]) is None:
        raise ConfigError(f"`{name}`: there is no program {words[0][:60]!r} here", "give its path")
    return str(value)


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("1", "true", "yes", "0", "false", "no"):
        return str(value).lower() in ("1", "true", "yes")
    raise ConfigError(f"`{name}` must be true or false")


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "name": _name,
    "port": _port,
    "hosts": _hosts,
    "peers": _texts,
    "mdns": _flag,
    "memory_bytes": _memory,
    "threads": _threads,
    "backends": _texts,
    "split": _split,
    "log_level": _log_level,
    "least_battery_percent": _percent,
    "only_when_charging": _flag,
    "most_celsius": _degrees,
    "most_battery_celsius": _degrees,
    "when_in_use": _when_in_use,
    "battery_command": _command,
    "api_port": _port,
    "api_key": _key,
}


def environment() -> Mapping[str, str]:
    """The process's environment: the only place that reads it for settings."""
    return os.environ
