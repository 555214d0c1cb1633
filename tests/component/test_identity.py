"""Keys, certificates and trust on a real file system."""

from __future__ import annotations

import itertools
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from confidantd.errors import DeviceError, IdentityError, NotPairedError
from confidantd.identity.certificate import load_or_create
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId
from confidantd.wire.roster import RosterEntry


def test_an_identity_is_made_once_and_private(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = load_or_create(home)
    assert load_or_create(home) == first
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(first.key_path.stat().st_mode) == 0o600


def test_a_key_that_others_can_read_is_refused_with_the_fix(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path)
    identity.key_path.chmod(0o640)
    with pytest.raises(IdentityError, match="readable by other users") as caught:
        load_or_create(tmp_path)
    assert caught.value.hint == f"chmod 600 {identity.key_path}"


def test_a_damaged_identity_is_refused(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path)
    identity.key_path.write_text("nothing")
    with pytest.raises(IdentityError, match="cannot be used"):
        load_or_create(tmp_path)


def test_trust_is_kept_in_files_and_tells_its_listeners(tmp_path: Path) -> None:
    one, two = load_or_create(tmp_path / "one"), load_or_create(tmp_path / "two")
    trust = TrustStore(tmp_path / "one")
    changes: list[int] = []
    trust.on_change(lambda members: changes.append(len(members)))
    assert trust.add(two.certificate_pem) == two.device_id
    assert list(TrustStore(tmp_path / "one").members()) == [two.device_id]
    with pytest.raises(DeviceError, match="this very device"):
        trust.add(one.certificate_pem)
    with pytest.raises(NotPairedError, match="not one certificate"):
        trust.add("hello")
    with pytest.raises(NotPairedError, match="damaged"):
        trust.add("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    trust.remove(two.device_id)
    assert trust.members() == {}
    assert changes == [1, 0]


def test_files_that_are_no_certificate_are_left_out(tmp_path: Path) -> None:
    two = load_or_create(tmp_path / "two")
    members = tmp_path / "one" / "members"
    members.mkdir(parents=True)
    (members / "junk.pem").write_text("junk")
    (members / f"{'0' * 64}.pem").write_text(two.certificate_pem)
    (members / "any-name.pem").write_text(two.certificate_pem)
    assert list(TrustStore(tmp_path / "one").members()) == [two.device_id]


def test_the_library_that_makes_keys_is_not_loaded_by_its_user(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from confidantd.identity.certificate import load_or_create\n"
        "load_or_create(pathlib.Path(sys.argv[1]))\n"
        "assert 'cryptography' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)


def test_the_highest_change_is_right_in_whatever_order_it_comes(tmp_path: Path) -> None:
    other = load_or_create(tmp_path / "other")
    added = RosterEntry(other.device_id, 1, other.certificate_pem)
    removed = RosterEntry(other.device_id, 2)
    again = RosterEntry(other.device_id, 3, other.certificate_pem)
    for number, order in enumerate(itertools.permutations([added, removed, again])):
        trust = TrustStore(tmp_path / str(number))
        for entry in order:
            trust.merge([entry])
        assert set(trust.members()) == {other.device_id}
        assert not trust.merge([added, removed, again])
        trust.remove(other.device_id)
        assert not trust.merge([added, removed, again])
        assert trust.members() == {}
        assert TrustStore(tmp_path / str(number)).members() == {}  # also after a restart


def test_a_roster_with_what_is_no_certificate_changes_nothing(tmp_path: Path) -> None:
    one, other = load_or_create(tmp_path / "one"), load_or_create(tmp_path / "other")
    trust = TrustStore(tmp_path / "home")
    for wrong in (
        RosterEntry(one.device_id, 1, other.certificate_pem),
        RosterEntry(one.device_id, 1, "-----BEGIN CERTIFICATE-----\nAAAA"),
        RosterEntry(one.device_id, 1),
        RosterEntry(DeviceId("../../etc"), 1, one.certificate_pem),
        RosterEntry(one.device_id, -1, one.certificate_pem),
        RosterEntry(one.device_id, 2**40 + 1, one.certificate_pem),
    ):
        assert not trust.merge([wrong])
    assert trust.members() == {}
