"""Keys, certificates and trust on a real file system."""

from __future__ import annotations

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from confidantd.errors import (
    DeviceError,
    IdentityError,
    NotPairedError,
    ProtocolError,
    StorageError,
)
from confidantd.identity.certificate import load_or_create
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId
from confidantd.net.tls import server_context


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


def test_a_damaged_list_of_members_is_said_and_not_forgotten(tmp_path: Path) -> None:
    one, two = load_or_create(tmp_path / "one"), load_or_create(tmp_path / "two")
    trust = TrustStore(one.home)
    trust.add(two.certificate_pem)
    trust.remove(two.device_id)
    file = one.home / "members.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    whole = file.read_text()
    for damaged in ("", "[]", whole[:-20], whole.replace('"format": 1', '"format": 2')):
        file.write_text(damaged)
        with pytest.raises(IdentityError, match="list of members"):
            TrustStore(one.home)
    file.write_text(whole)
    assert TrustStore(one.home).members() == {}


def test_what_cannot_be_written_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = load_or_create(tmp_path / "one"), load_or_create(tmp_path / "two")
    trust = TrustStore(one.home)
    trust.add(two.certificate_pem)

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("confidantd.identity.trust.write_private_file", full)
    with pytest.raises(StorageError):
        trust.remove(two.device_id)
    assert set(trust.members()) == {two.device_id}
    monkeypatch.undo()
    trust.remove(two.device_id)
    assert TrustStore(one.home).members() == {}


def test_the_library_that_makes_keys_is_not_loaded_by_its_user(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from confidantd.identity.certificate import load_or_create\n"
        "load_or_create(pathlib.Path(sys.argv[1]))\n"
        "assert 'cryptography' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)


class Three:
    """Anna who trusts Ben, and what Ben says, signed by his key."""

    def __init__(self, folder: Path) -> None:
        self.anna, self.ben, self.cleo = (
            load_or_create(folder / name) for name in ("anna", "ben", "cleo")
        )
        self.trust = TrustStore(self.anna.home)
        self.trust.add(self.ben.certificate_pem)
        bens = TrustStore(self.ben.home)
        bens.add(self.cleo.certificate_pem)
        assert bens.statements() == ()  # nothing is told unsigned
        bens.sign()
        (self.said,) = bens.statements()

    def trusted(self) -> set[DeviceId]:
        return set(TrustStore(self.anna.home).members())


def test_a_member_vouches_with_its_signature(tmp_path: Path) -> None:
    three = Three(tmp_path)
    assert three.trust.merge([three.said])
    assert not three.trust.merge([three.said])
    assert three.trusted() == {three.ben.device_id, three.cleo.device_id}
    assert three.trust.introducers(three.cleo.device_id) == {three.ben.device_id}
    three.trust.remove(three.cleo.device_id)
    assert not three.trust.merge([three.said])
    assert three.trusted() == {three.ben.device_id}
    (removal,) = three.trust.removal_of(three.cleo.device_id)
    assert removal.signature


def test_what_a_member_has_not_signed_counts_nothing(tmp_path: Path) -> None:
    three = Three(tmp_path)
    said, eve = three.said, load_or_create(tmp_path / "eve")
    swapped = replace(said, device=eve.device_id, certificate=eve.certificate_pem)
    for wrong in (
        replace(said, signature=b""),
        replace(said, signature=said.signature[:-1] + bytes([said.signature[-1] ^ 1])),
        replace(said, signature=b"x" * 10_000),
        replace(said, change=3),
        swapped,
        replace(said, certificate=eve.certificate_pem),
        replace(said, certificate="-----BEGIN CERTIFICATE-----\nAAAA"),
    ):
        with pytest.raises(ProtocolError):
            three.trust.merge([wrong])
    by_a_stranger = replace(said, author=eve.device_id)
    assert not three.trust.merge([by_a_stranger])
    assert three.trusted() == {three.ben.device_id}


def test_a_certificate_is_written_in_one_way(tmp_path: Path) -> None:
    """OpenSSL refuses a list of roots in which one has a foreign character in its middle."""
    three, eve = Three(tmp_path), load_or_create(tmp_path / "eve")
    lines = eve.certificate_pem.splitlines()
    lax = "\n".join([lines[0], "!" + lines[1], *lines[2:]])
    three.trust.add(lax)
    server_context(three.anna.home)
    assert three.trust.members()[eve.device_id] == eve.certificate_pem
    with pytest.raises(ProtocolError, match="wrong certificate"):
        three.trust.merge([replace(three.said, device=eve.device_id, certificate=lax)])


def test_who_hears_that_it_was_removed_trusts_nobody_and_says_so_when_it_joins(
    tmp_path: Path,
) -> None:
    three = Three(tmp_path)
    bens = TrustStore(three.ben.home)
    bens.add(three.anna.certificate_pem)
    bens.remove(three.anna.device_id)
    assert three.trust.merge(bens.removal_of(three.anna.device_id))
    again = TrustStore(three.anna.home)
    assert again.members() == {}
    assert again.gone == 1
    _, gone = bens.invited(three.anna.certificate_pem, again.gone)
    again.joined(three.ben.certificate_pem, gone, bens.gone, merge=False)
    bens.sign()
    again.merge(bens.statements())
    assert set(again.members()) == {three.ben.device_id, three.cleo.device_id}


def test_who_leaves_says_it_signed(tmp_path: Path) -> None:
    three = Three(tmp_path)
    three.trust.merge([three.said])
    cleos = TrustStore(three.cleo.home)
    cleos.add(three.ben.certificate_pem)
    assert three.trust.merge(cleos.farewell())
    assert three.trusted() == {three.ben.device_id}
    cleos.leave()
    assert cleos.members() == {}
    assert TrustStore(three.cleo.home).gone == 1


def test_what_a_removed_device_did_on_its_own_does_not_come_along_when_it_joins_again(
    tmp_path: Path,
) -> None:
    three = Three(tmp_path)
    three.trust.merge([three.said])
    cleos = TrustStore(three.cleo.home)
    for other in (three.anna, three.ben):
        cleos.add(other.certificate_pem)
    three.trust.remove(three.cleo.device_id)  # while cleo is off
    for other in (three.anna, three.ben):
        cleos.remove(other.device_id)  # and cleo does the same to them
    _, gone = three.trust.invited(three.cleo.certificate_pem, cleos.gone)
    cleos.joined(three.anna.certificate_pem, gone, three.trust.gone, merge=False)
    three.trust.sign()
    cleos.merge(s for s in three.trust.statements() if not s.admits)  # the old removal first
    cleos.merge(three.trust.statements())
    cleos.sign()
    three.trust.merge(cleos.statements())
    assert set(cleos.members()) == {three.anna.device_id, three.ben.device_id}
    assert three.trusted() == {three.ben.device_id, three.cleo.device_id}


def test_one_that_left_invites_one_that_left_and_old_news_of_that_is_nothing(
    tmp_path: Path,
) -> None:
    """Also where the invited one has forgotten by which change the other went."""
    three = Three(tmp_path)
    anna, bens = three.trust, TrustStore(three.ben.home)
    bens.merge(anna.statements())
    old = anna.farewell()
    bens.merge(old)
    anna.leave()
    bens.leave()
    _, gone = anna.invited(three.ben.certificate_pem, bens.gone)
    bens.joined(three.anna.certificate_pem, gone, anna.gone, merge=False)
    bens.merge(old)
    assert three.anna.device_id in bens.members()
    anna.sign()
    bens.merge(anna.statements())
    bens.sign()
    anna.merge(bens.statements())
    assert three.anna.device_id in bens.members()
    assert three.ben.device_id in anna.members()
