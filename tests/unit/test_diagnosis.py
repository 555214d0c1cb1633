"""Why devices do not see each other: the cause and the fix for each picture."""

from __future__ import annotations

from dataclasses import replace

import pytest

from confidantd.swarm.diagnosis import Answer, Facts, Finding, Neighbour, findings

HERE = {"10.0.0.1": "wlan0"}
BEN = Neighbour("ben", True, "4", {}, Answer({"10.0.0.1:7480": "ok"}, True, 0.5))
GONE = Neighbour("ben", False)
FACTS = Facts("4", 7480, "running", "", HERE, [BEN])


def found(facts: Facts, name: str) -> Finding:
    """The one line of that name."""
    (line,) = [f for f in findings(facts) if f.name == name]
    return line


def test_where_all_is_well_nothing_is_to_be_done() -> None:
    lines = list(findings(FACTS))
    assert {line.state for line in lines} == {"ok"}
    assert not any(line.hint for line in lines)
    assert "10.0.0.1 (wlan0), port 7480" in found(FACTS, "network").message


def test_no_interface_and_loopback_only() -> None:
    assert found(replace(FACTS, addresses={}), "network").state == "fail"
    only = found(replace(FACTS, addresses={"127.0.0.1": "lo"}), "network")
    assert only.state == "warn"
    assert "--host" in only.hint


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (replace(BEN, announced=None), "no announcement of ben arrives here"),
        (
            replace(BEN, answer=Answer({"10.0.0.1:7480": "ok"}, False, 0.0)),
            "none of this device arrives at ben",
        ),
    ],
)
def test_multicast_that_is_filtered_one_way_or_both(there: Neighbour, said: str) -> None:
    line = found(replace(FACTS, neighbours=[there]), "multicast")
    assert line.state == "warn"
    assert said in line.message
    assert "filtered" in line.message
    assert "isolation" in line.hint
    assert "--peer" in line.hint


def test_mdns_that_is_off_or_broken() -> None:
    assert "--no-mdns" in found(replace(FACTS, mdns="off"), "multicast").message
    broken = replace(FACTS, mdns="failed", mdns_problem="permission denied")
    assert "permission denied" in found(broken, "multicast").message


def test_nobody_is_heard_and_nobody_is_connected() -> None:
    line = found(replace(FACTS, neighbours=[GONE]), "multicast")
    assert line.state == "warn"
    assert "5353" in line.hint
    assert found(replace(FACTS, neighbours=[]), "multicast").state == "ok"


def test_a_firewall_here() -> None:
    blocked = replace(BEN, answer=Answer({"10.0.0.1:7480": "silent"}, True, 0.0))
    line = found(replace(FACTS, neighbours=[blocked]), "incoming")
    assert line.state == "fail"
    assert "ben cannot connect to this device (no answer at 10.0.0.1:7480)" in line.message
    assert "TCP port 7480" in line.hint


def test_an_interface_that_others_do_not_reach() -> None:
    answer = Answer({"10.0.0.1:7480": "ok", "172.17.0.1:7480": "silent"}, True, 0.0)
    both = {**HERE, "172.17.0.1": "eth1"}
    facts = replace(FACTS, addresses=both, neighbours=[replace(BEN, answer=answer)])
    line = found(facts, "incoming")
    assert line.state == "warn"
    assert "172.17.0.1:7480 (eth1: no answer), but at 10.0.0.1" in line.message
    assert "--host 10.0.0.1" in line.hint


AT = "10.0.0.2:7480"


@pytest.mark.parametrize(
    ("there", "message", "hint"),
    [
        (replace(GONE, announced="3"), "protocol 3, this device 4", "same release"),
        (
            replace(GONE, failures={AT: ("protocol", "the other device speaks protocol 3")}),
            "speaks protocol 3", "same release",
        ),
        (replace(GONE, failures={AT: ("not-paired", "x")}), "does not trust", "leave here"),
        (
            replace(GONE, announced="4", failures={AT: ("peer-lost", "x")}),
            f"announces itself, but no connection to it opens ({AT})", "firewall on ben",
        ),
        (replace(GONE, failures={AT: ("peer-refused", "x")}), f"nothing listens at {AT}", "start"),
        (replace(GONE, failures={AT: ("peer-lost", "x")}), f"does not answer at {AT}", "is off"),
        (
            replace(GONE, failures={AT: ("unexpected-device", "x")}),
            f"another device than ben answers at {AT}", "--peer",
        ),
        (GONE, "no address of ben is known", "--peer"),
    ],
)  # fmt: skip
def test_a_member_that_is_not_there(there: Neighbour, message: str, hint: str) -> None:
    line = found(replace(FACTS, neighbours=[there]), "peer ben")
    assert line.state in ("warn", "fail")
    assert message in line.message
    assert hint in line.hint


def test_clocks_strangers_and_typed_addresses() -> None:
    late = replace(BEN, answer=Answer({}, True, -3600.0))
    assert "3600 s behind" in found(replace(FACTS, neighbours=[late]), "clock").message
    facts = replace(FACTS, unpaired=[("cleo", "4"), ("dora", "9")])
    assert "dora" in found(facts, "release").message
    assert "cleo" in found(facts, "unpaired").message
    assert "invite" in found(facts, "unpaired").hint
    typed = replace(FACTS, typed={AT: ("peer-refused", f"nothing listens at {AT}")})
    assert "start confidantd there" in found(typed, f"--peer {AT}").hint


def test_many_devices_are_counted() -> None:
    facts = replace(FACTS, unpaired=[(f"d{i}", "4") for i in range(9)])
    assert "d0, d1, d2 and 6 more" in found(facts, "unpaired").message
