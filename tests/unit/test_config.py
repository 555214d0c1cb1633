"""Settings: file, then environment, then flags; a wrong one is one clear line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.config import DaemonConfig, default_home, load_config, parse_size
from confidantd.errors import ConfigError


def load(home: Path, toml: str = "", **flags: object) -> DaemonConfig:
    """The settings of a home with this file, no environment, and these flags."""
    (home / "config.toml").write_text(toml)
    return load_config({"home": str(home), **flags}, {})


def test_defaults(tmp_path: Path) -> None:
    config = load_config({}, {"CONFIDANT_HOME": str(tmp_path)})
    assert config.home == tmp_path
    assert config.name
    assert (config.port, config.memory_bytes, config.threads) == (None, None, None)
    assert config.mdns
    assert config.peers == ()
    assert config.log_level == "info"


def test_home_is_the_flag_then_the_environment_then_the_platforms(tmp_path: Path) -> None:
    environment = {"CONFIDANT_HOME": str(tmp_path / "a")}
    assert load_config({"home": str(tmp_path / "b")}, environment).home == tmp_path / "b"
    assert load_config({}, environment).home == tmp_path / "a"
    assert default_home({}).name == "confidant"


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('name = "file"\nport = 1\nthreads = 1\n')
    environment = {"CONFIDANT_NAME": "environment", "CONFIDANT_PORT": "2"}
    flags = {"home": str(tmp_path), "name": "flag", "port": None, "peers": ()}
    config = load_config(flags, environment)
    assert (config.name, config.port, config.threads) == ("flag", 2, 1)


def test_every_setting_from_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        'name = "anna"\nport = 7000\nhosts = ["127.0.0.1", "::1"]\npeers = ["ben:7001"]\n'
        'mdns = false\nmemory_bytes = "1.5GiB"\nthreads = 2\nlog_level = "DEBUG"\n'
        "least_battery_percent = 40\nonly_when_charging = true\nmost_celsius = 80.5\n"
        'most_battery_celsius = 40\nwhen_in_use = "decline"\nbattery_command = "sh -c true"\n',
    )
    assert config == DaemonConfig(
        tmp_path, "anna", 7000, ("127.0.0.1", "::1"), ("ben:7001",), mdns=False,
        memory_bytes=3 * 2**29, threads=2, log_level="debug", least_battery_percent=40.0,
        only_when_charging=True, most_celsius=80.5, most_battery_celsius=40.0,
        when_in_use="decline", battery_command="sh -c true",
    )  # fmt: skip


def test_every_setting_from_the_environment(tmp_path: Path) -> None:
    config = load_config(
        {"home": str(tmp_path)},
        {
            "CONFIDANT_NAME": "ben",
            "CONFIDANT_PORT": "7000",
            "CONFIDANT_HOSTS": "127.0.0.1, ::1",
            "CONFIDANT_PEERS": "anna:1 cleo:2",
            "CONFIDANT_MDNS": "no",
            "CONFIDANT_MEMORY_BYTES": "512M",
            "CONFIDANT_THREADS": "3",
            "CONFIDANT_LOG_LEVEL": "warning",
            "CONFIDANT_LEAST_BATTERY_PERCENT": "0",
            "CONFIDANT_ONLY_WHEN_CHARGING": "yes",
            "CONFIDANT_MOST_CELSIUS": "70",
            "CONFIDANT_WHEN_IN_USE": "decline",
        },
    )
    assert config == DaemonConfig(
        tmp_path, "ben", 7000, ("127.0.0.1", "::1"), ("anna:1", "cleo:2"), mdns=False,
        memory_bytes=2**29, threads=3, log_level="warning", least_battery_percent=0.0,
        only_when_charging=True, most_celsius=70.0, when_in_use="decline",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * 2**20),
        ("2G", 2 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("100", 100),
        ("64 kb", 64 * 2**10),
        ("1t", 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("prot = 1", "port"),
        ("memory = '1G'", "memory_bytes"),
        ("zzz = 1", "known settings"),
        ("port = 70000", "from 0 to 65535"),
        ("port = true", "whole number"),
        ("port = 1.5", "whole number"),
        ("threads = 0", "from 1"),
        ("memory_bytes = 'a lot'", "512M"),
        ("memory_bytes = 0", "over 0"),
        ("memory_bytes = '0G'", "over 0"),
        ("hosts = 'all'", "list"),
        ("hosts = []", "one address"),
        ("hosts = ['here']", "not an IP address"),
        ("peers = [1]", "list"),
        ("mdns = 'perhaps'", "true or false"),
        ("log_level = 'loud'", "warning"),
        ("least_battery_percent = 101", "number from 0 to 100"),
        ("least_battery_percent = 'half'", "number from 0 to 100"),
        ("least_battery_percent = nan", "number from 0 to 100"),
        ("most_celsius = true", "number from 1 to 150"),
        ("most_battery_celsius = 0", "number from 1 to 150"),
        ("only_when_charging = 3", "true or false"),
        ("when_in_use = 'never'", "known: share, decline"),
        ("battery_command = 'a \"b'", "command line"),
        ("battery_command = 3", "command line"),
        ("battery_command = '/nowhere/battery -x'", "no program '/nowhere/battery'"),
        ("name = ''", "name"),
        ("name = 'a,b'", "name"),
        ("not toml", "config.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, toml: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_config({"home": str(tmp_path)}, {})


def test_a_home_whose_socket_would_have_too_long_a_path() -> None:
    with pytest.raises(ConfigError, match="shorter"):
        load_config({"home": "/" + "h" * 100}, {})
