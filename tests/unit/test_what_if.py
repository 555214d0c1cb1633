"""Fleets in a file: what is read, and what is wrong in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.errors import ConfidantError, DeviceError, UsageError
from confidantd.jobs.what_if import MOST_DEVICES, read_fleet
from confidantd.planner.costs import PlanDevice, link_cost
from tests.unit.planner_support import make_plan, workload

PHONES = """
mbps = 50
round_trip_ms = 6

[[device]]
name = "phone"
count = 3
memory = "2G"
gflops = 12
mbps = 20

[[device]]
name = "laptop"
memory = "8G"
gflops = 90
owner = true
"""
NAMED = '[[device]]\nname = "{}"\nmemory = "2G"\ngflops = 5\n'
ONE = NAMED.format("a")
TWO = ONE + NAMED.format("b")
LINK = '[[link]]\nbetween = ["a", "b"]\n'


def written(folder: Path, text: str) -> str:
    """A file with that text."""
    file = folder / "fleet.toml"
    file.write_text(text)
    return str(file)


def test_devices_links_and_owner(tmp_path: Path) -> None:
    fleet = read_fleet(written(tmp_path, PHONES))
    assert [d.name for d in fleet.devices] == ["phone-1", "phone-2", "phone-3", "laptop"]
    phone, laptop = fleet.devices[0], fleet.devices[3]
    assert (phone.available_bytes, phone.gflops, phone.bandwidth_mbps) == (2 * 1024**3, 12, 20)
    assert (laptop.bandwidth_mbps, laptop.round_trip_seconds) == (50, 0.006)
    assert fleet.owner == laptop.id
    assert len({d.id for d in fleet.devices}) == 4


def test_the_first_device_has_the_data_unless_one_says_so(tmp_path: Path) -> None:
    fleet = read_fleet(written(tmp_path, PHONES.replace("owner = true", "")))
    assert fleet.owner == fleet.devices[0].id


def test_single_pairs_have_links_of_their_own(tmp_path: Path) -> None:
    pair = '[[link]]\nbetween = ["phone-1", "laptop"]\nmbps = 5\nround_trip_ms = 40\n'
    near = '[[link]]\nbetween = ["laptop", "phone-2"]\nround_trip_ms = 1\n'
    one, two, three, laptop = read_fleet(written(tmp_path, PHONES + pair + near)).devices
    bits = 8 * workload().activation_bytes

    def cost(*ends: PlanDevice) -> tuple[float, float]:
        found = link_cost(workload(), *ends)
        return pytest.approx(bits / found.seconds / 1e6), pytest.approx(found.latency)

    assert cost(one, laptop) == cost(laptop, one) == (5, 0.020)
    assert cost(two, laptop) == (20, 0.0005)
    assert cost(three, laptop) == (20, 0.003)


def test_only_some_of_them(tmp_path: Path) -> None:
    fleet = read_fleet(written(tmp_path, PHONES))
    two = fleet.only(("phone-2", "laptop"))
    assert [d.name for d in two.devices] == ["phone-2", "laptop"]
    assert two.owner == fleet.owner
    assert fleet.only(("phone-2",)).owner == fleet.devices[1].id
    assert fleet.only(()) == fleet
    with pytest.raises(DeviceError, match="there is no device phone in the what-if file"):
        fleet.only(("phone",))


def test_five_hundred_devices_are_planned_for(tmp_path: Path) -> None:
    text = PHONES.replace("count = 3", f"count = {MOST_DEVICES - 1}")
    fleet = read_fleet(written(tmp_path, text))
    assert len(fleet.devices) == MOST_DEVICES
    plan = make_plan(workload(layers=32), fleet.devices, fleet.owner)
    assert plan.stages[0].name == "laptop"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no [[device]]"),
        ("device = []", "there is no [[device]]"),
        ("device = [3]", "write [[device]]"),
        ("[[device]", "is not TOML"),
        ("\udcff", "is not TOML"),
        ("speed = 3\n" + ONE, "the file has an unknown key 'speed'"),
        ('[[device]]\nmemory = "2G"\ngflops = 5', "device 1 has no name"),
        (ONE.replace('"a"', '""'), "device 1 has no name"),
        (ONE.replace('memory = "2G"', ""), "device a has no memory"),
        (ONE.replace("2G", "much"), "device a has no memory"),
        (ONE.replace('"2G"', "2"), "device a has no memory"),
        ("mbps = 0\n" + ONE, "the file: mbps must be over 0"),
        (ONE.replace("gflops = 5", ""), "device a has no gflops"),
        (ONE.replace("5", "0"), "device a: gflops must be over 0"),
        (ONE.replace("5", "inf"), "device a: gflops must be over 0"),
        (ONE.replace("5", "nan"), "device a: gflops must be over 0"),
        (ONE.replace("5", "true"), "device a: gflops is not a number"),
        (ONE + "mbps = -1", "device a: mbps must be over 0"),
        (ONE + "count = 0", "device a: count is not a whole number"),
        (ONE + "count = 513", "device a: count is not a whole number"),
        (ONE + "cout = 3", "device a has an unknown key 'cout'"),
        (ONE + 'owner = "yes"', "device a: owner is not true or false"),
        (ONE + ONE, "two devices have the same name, a"),
        (ONE + "owner = true\n" + NAMED.format("b") + "owner = true", "more than one device"),
        (ONE + "link = 3", "device a has an unknown key 'link'"),
        ("link = 3\n" + ONE, "write [[link]]"),
        ("link = [3]\n" + ONE, "write [[link]]"),
        (TWO + "[[link]]\nmbps = 3", "link 1 has no between"),
        (TWO + '[[link]]\nbetween = "a"', "link 1 has no between"),
        (TWO + '[[link]]\nbetween = ["a", "b", "c"]', "link 1 has no between"),
        (TWO + '[[link]]\nbetween = ["a", 3]\nmbps = 1', "link 1: there is no device '3'"),
        (TWO + '[[link]]\nbetween = ["a", "c"]\nmbps = 1', "no device 'c'; the file has a, b"),
        (TWO + '[[link]]\nbetween = ["b", "b"]\nmbps = 1', "link 1 is between b and itself"),
        (TWO + LINK, "between a and b has neither mbps nor round_trip_ms"),
        (TWO + LINK + "mbps = 0", "the link between a and b: mbps must be over 0"),
        (TWO + LINK + "mbps = nan", "the link between a and b: mbps must be over 0"),
        (TWO + LINK + "round_trip_ms = 'x'", "a and b: round_trip_ms is not a number"),
        (TWO + LINK + "speed = 3", "link 1 has an unknown key 'speed'"),
        (
            TWO + LINK + 'mbps = 1\n[[link]]\nbetween = ["b", "a"]\nmbps = 2',
            "the link between b and a is there twice",
        ),
        ("".join(f"{NAMED.format(i)}count = 400\n" for i in "xy"), "more than 512"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "fleet.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as failure:
        read_fleet(str(file))
    assert said in failure.value.message
    assert "\n" not in failure.value.message
    assert str(file) in failure.value.message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_fleet(str(tmp_path / "absent.toml"))
    with pytest.raises(UsageError, match="Is a directory"):
        read_fleet(str(tmp_path))
    with pytest.raises(UsageError, match="over the limit"):
        read_fleet(written(tmp_path, "#" * 2_000_000))


@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_fleet_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    file.write_bytes(data)
    with pytest.raises(ConfidantError) as failure:
        read_fleet(str(file))
    assert "\n" not in failure.value.message
