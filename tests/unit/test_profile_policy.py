"""Whether a device takes work: its policy against its charge, heat and use; and those readings."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.config import DaemonConfig
from confidantd.profile.policy import (
    COOLER_CELSIUS,
    IN_USE_SHARE,
    UNUSED_SHARE,
    Policy,
    Readings,
    refusal,
)
from confidantd.profile.temperature import hottest
from confidantd.profile.use import SMOOTHED_SECONDS, UseMeter, busy_seconds, own_seconds
from confidantd.wire.resources import MAX_REASON_CHARACTERS

DEFAULT = Policy()
CAREFUL = Policy(only_when_charging=True)
QUIET = Policy(when_in_use="decline")
COOL = Policy(most_celsius=70.0)


@pytest.mark.parametrize(
    ("policy", "now", "said"),
    [
        (DEFAULT, Readings(), ""),
        (DEFAULT, Readings(False, 20.0), ""),
        (DEFAULT, Readings(False, 19.0), "its battery is at 19 % (least_battery_percent = 20)"),
        (DEFAULT, Readings(None, 19.0), "its battery is at 19 % (least_battery_percent = 20)"),
        (DEFAULT, Readings(True, 1.0), ""),
        (replace(DEFAULT, least_battery_percent=0.0), Readings(False, 1.0), ""),
        (CAREFUL, Readings(True, 1.0), ""),
        (CAREFUL, Readings(False, 99.0), "it does not charge (only_when_charging)"),
        (CAREFUL, Readings(), ""),  # mains
        (CAREFUL, Readings(phone=True), "it is not known whether it charges (only_when_charging)"),
        (DEFAULT, Readings(celsius=95.0, battery_celsius=45.0), ""),
        (
            DEFAULT,
            Readings(celsius=95.0, battery_celsius=46.0),
            "its battery is at 46 °C (most_battery_celsius = 45)",
        ),
        (COOL, Readings(celsius=70.0), ""),
        (COOL, Readings(celsius=71.0), "it is at 71 °C (most_celsius = 70)"),
        (DEFAULT, Readings(others_share=1.0), ""),
        (QUIET, Readings(), ""),
        (QUIET, Readings(others_share=0.2), ""),
        (
            QUIET,
            Readings(others_share=0.4),
            "other programs use 40 % of it (when_in_use = decline)",
        ),
    ],
)
def test_reasons_not_to_take_work(policy: Policy, now: Readings, said: str) -> None:
    assert refusal(policy, now, refusing=False) == said


def test_heat_and_use_must_be_clearly_over() -> None:
    almost = Readings(celsius=70.0 - COOLER_CELSIUS / 2)
    assert not refusal(COOL, almost, refusing=False)
    assert refusal(COOL, almost, refusing=True)
    assert not refusal(COOL, Readings(celsius=70.0 - COOLER_CELSIUS), refusing=True)
    almost = Readings(others_share=(IN_USE_SHARE + UNUSED_SHARE) / 2)
    assert not refusal(QUIET, almost, refusing=False)
    assert refusal(QUIET, almost, refusing=True)
    assert not refusal(QUIET, Readings(others_share=UNUSED_SHARE), refusing=True)


readings = st.builds(
    Readings,
    st.sampled_from([None, True, False]),
    st.none() | st.floats(0, 100),
    st.none() | st.floats(1, 125),
    st.none() | st.floats(1, 125),
    st.none() | st.floats(0, 1),
    st.booleans(),
)
policies = st.builds(
    Policy,
    st.floats(0, 100),
    st.booleans(),
    st.none() | st.floats(1, 150),
    st.floats(1, 150),
    st.sampled_from(["share", "decline"]),
)


@given(policies, readings)
def test_who_refuses_goes_on_refusing_and_says_so_briefly(policy: Policy, now: Readings) -> None:
    said = refusal(policy, now, refusing=False)
    assert len(said) <= MAX_REASON_CHARACTERS
    if said:
        assert refusal(policy, now, refusing=True)


def test_the_policy_is_among_the_settings() -> None:
    config = DaemonConfig(Path("/home"), "a", least_battery_percent=5.0, when_in_use="decline")
    assert Policy.of(config) == Policy(least_battery_percent=5.0, when_in_use="decline")
    assert Policy.of(DaemonConfig(Path("/home"), "a")) == Policy()


def sensors(root: Path, **files: str) -> None:
    """Files of `/sys/class`: `hwmon__0__name="coretemp"`."""
    for name, text in files.items():
        path = root.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_a_laptops_sensors(tmp_path: Path) -> None:
    sensors(
        tmp_path,
        hwmon__0__name="nvme", hwmon__0__temp1_input="88000",
        hwmon__1__name="coretemp", hwmon__1__temp1_input="61000", hwmon__1__temp2_input="64500",
        hwmon__2__name="iwlwifi_1", hwmon__2__temp1_input="90000",
        thermal__0__type="acpitz", thermal__0__temp="99000",
        power_supply__0__type="Battery", power_supply__0__temp="312",
        power_supply__1__type="Mains", power_supply__1__temp="900",
    )  # fmt: skip
    assert hottest(tmp_path) == (64.5, 31.2)


def test_a_phones_sensors(tmp_path: Path) -> None:
    sensors(
        tmp_path,
        thermal__0__type="cpu-1-2-usr", thermal__0__temp="52300",
        thermal__1__type="battery", thermal__1__temp="38100",
        thermal__2__type="soc", thermal__2__temp="97",
        thermal__3__type="gpuss-0-usr", thermal__3__temp="66000",
        thermal__4__type="cpu-0-3-usr", thermal__4__temp="-40000",
        thermal__5__type="mtktscpu", thermal__5__temp="no",
        thermal__6__type="BIG", thermal__6__temp="58",
    )  # fmt: skip
    assert hottest(tmp_path) == (58.0, 38.1)


def test_no_sensor_and_none_that_may_be_read(tmp_path: Path) -> None:
    assert hottest(tmp_path / "none") == (None, None)
    (tmp_path / "thermal" / "0" / "temp").mkdir(parents=True)
    (tmp_path / "thermal" / "0" / "type").write_text("cpu")
    assert hottest(tmp_path) == (None, None)


class Machine:
    """CPU seconds of all programs and of ours on two cores, and a clock that a test moves."""

    def __init__(self) -> None:
        self.now, self.all, self.ours = 0.0, 100.0, 10.0
        self.meter = UseMeter(lambda: (self.all, 2), lambda: self.ours, lambda: self.now)

    def run(self, seconds: float, others: float, ours: float) -> float | None:
        """Let time pass in which others and we use so many cores."""
        self.now += seconds
        self.ours += ours * seconds
        self.all += (others + ours) * seconds
        return self.meter.latest()


def test_our_own_work_is_no_use() -> None:
    machine = Machine()
    assert machine.meter.latest() is None
    assert machine.run(5, others=0.0, ours=2.0) == pytest.approx(0.0)
    assert machine.run(300, others=1.0, ours=1.0) == pytest.approx(0.5, rel=0.01)


def test_use_is_smoothed_and_looks_in_between_change_nothing() -> None:
    machine = Machine()
    machine.meter.latest()
    machine.run(5, others=0.0, ours=0.0)
    short = machine.run(3, others=2.0, ours=0.0)
    assert short is not None
    assert 0 < short < IN_USE_SHARE
    assert machine.run(0.5, others=2.0, ours=0.0) == short
    assert machine.run(SMOOTHED_SECONDS, others=2.0, ours=0.0) == pytest.approx(0.66, abs=0.05)


def test_where_the_system_tells_nothing() -> None:
    assert UseMeter(lambda: None, lambda: 0.0).latest() is None


def test_this_machines_counters() -> None:
    before, own = busy_seconds(), own_seconds()
    assert before is not None
    until = time.process_time() + 0.05  # five ticks of the kernel's clock
    while time.process_time() < until:
        pass
    after = busy_seconds()
    assert after is not None
    assert after[0] >= before[0] > 0
    assert after[1] == before[1] > 0
    assert own_seconds() > own > 0
