"""What this device has promised to jobs: which stages, how much memory, until when.

Bookkeeping only, with the time passed in. A stage is known by its job, epoch and place; one
device may hold two of a job (both ends of its pipeline). A running stage that is offered a
place in the job's next epoch keeps running in the old one until it is started in the new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from confidantd.errors import ProtocolError, StaleEpochError
from confidantd.ids import DeviceId, Digest, JobId
from confidantd.wire.jobs import Offer

if TYPE_CHECKING:
    from confidantd.jobs.stage_process import StageProcess

OFFER_SECONDS = 120.0  # a granted offer that is not started by then is forgotten
TRAINED = "trained-"  # folders of stages begin so
MAX_REMEMBERED_EPOCHS = 1_000
NEVER = float("inf")


class Place(NamedTuple):
    """Of a stage."""

    job: JobId
    epoch: int
    stage: int


def place_of(offer: Offer) -> Place:
    """Where the offered stage stands."""
    return Place(offer.job, offer.epoch, offer.stage)


@dataclass(slots=True)
class Held:
    """One granted stage; `process` is there once it was started.

    `starting`: it is being loaded, and still has what it held before (`leaving_bytes`).
    `released`: it is gone; whoever still works on it must stop.
    """

    offer: Offer
    coordinator: DeviceId
    expires: float
    folder: str  # below the job's, for what it has trained
    process: StageProcess | None = None
    next_offer: Offer | None = None
    trained: list[Digest] = field(default_factory=list)  # blobs that others may fetch
    snapshots: dict[int, list[Digest]] = field(default_factory=dict)  # the same, by steps done
    starting: bool = False
    released: bool = False
    leaving_bytes: int = 0

    @property
    def blobs(self) -> set[Digest]:
        """All that it has in the store."""
        return set(self.trained).union(*self.snapshots.values())

    @property
    def memory_bytes(self) -> int:
        """What is set aside for it."""
        following = self.next_offer.memory_bytes if self.next_offer else 0
        return max(self.offer.memory_bytes, following, self.leaving_bytes)


class Grants:
    """All promises of this device."""

    def __init__(self) -> None:
        self._held: dict[Place, Held] = {}
        self._epochs: dict[JobId, int] = {}

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def bytes(self) -> int:
        """Memory promised."""
        return sum(held.memory_bytes for held in self._held.values())

    def check(self, offer: Offer) -> Held | None:
        """The running stage that would go on as the offered one; raises if that cannot be.

        What an earlier round of the same negotiation granted is forgotten.
        """
        if offer.epoch < self._epochs.get(offer.job, 0):
            raise StaleEpochError(f"job {offer.job} is already in a later epoch here")
        self._forget_rounds_before(offer)
        held = self._held.get(place_of(offer))
        if held is not None and held.process is not None:
            raise StaleEpochError(f"job {offer.job} already runs here in epoch {offer.epoch}")
        if offer.goes_on is None:
            return None
        running = [h for h in self._of(offer.job) if h.process is not None]
        for held in running:
            if held.offer.owner != offer.owner:
                raise ProtocolError(f"job {offer.job} belongs to another device")
            if held.offer.stage == offer.goes_on and held.offer.epoch < offer.epoch:
                return held
        raise StaleEpochError(f"stage {offer.goes_on} of job {offer.job} does not run here")

    def grant(self, offer: Offer, coordinator: DeviceId, now: float) -> None:
        """Promise the memory."""
        running = self.check(offer)
        self._epochs[offer.job] = offer.epoch
        while len(self._epochs) > MAX_REMEMBERED_EPOCHS:
            self._epochs.pop(next(iter(self._epochs)))
        expires = now + OFFER_SECONDS
        if running is None:
            folder = f"{TRAINED}{offer.epoch}-{offer.stage}"
            self._held[place_of(offer)] = Held(offer, coordinator, expires, folder)
        else:
            running.next_offer, running.coordinator, running.expires = offer, coordinator, expires

    def made_by(self, device: DeviceId, params: Mapping[str, Any]) -> bool:
        """Whether what was promised for a job, if anything, was asked for by that device."""
        held = list(self._of(JobId(str(params.get("job")))))
        return not held or any(h.coordinator == device for h in held)

    def owned_by(self, device: DeviceId, params: Mapping[str, Any]) -> bool:
        """Whether what is held of a job, if anything, is that device's."""
        owners = {h.offer.owner for h in self._of(JobId(str(params.get("job"))))}
        return not owners or device in owners

    def withdraw(self, job: JobId, epoch: int, coordinator: DeviceId) -> None:
        """Forget what was promised for an epoch that is not started; only who asked for it may."""
        for held in self._of(job):
            if held.coordinator == coordinator:
                self._unpromise(held, epoch)

    def starting(self, owner: DeviceId, place: Place) -> Held:
        """The stage that is started now: a new one, or a running one in its next epoch."""
        for held in self._of(place.job):
            offer = held.next_offer
            if offer is not None and place_of(offer) == place and offer.owner == owner:
                del self._held[place_of(held.offer)]
                held.leaving_bytes = held.offer.memory_bytes
                held.offer, held.next_offer, held.expires = offer, None, NEVER
                self._held[place] = held
                return self._start(held)
        held = self.find(owner, place)
        if held.process is not None:
            raise ProtocolError(f"job {place.job} already runs here")
        held.expires = NEVER
        return self._start(held)

    def _start(self, held: Held) -> Held:
        if held.starting:
            raise ProtocolError(f"a stage of job {held.offer.job} is being started already")
        held.starting = True
        return held

    def started(self, held: Held) -> None:
        """It is loaded, and what it held before is given back."""
        held.starting, held.leaving_bytes = False, 0

    def drop(self, owner: DeviceId, job: JobId, epoch: int) -> None:
        """The owner wants nothing of an epoch that running stages were offered a place in."""
        for held in self._of(job):
            if held.offer.owner == owner and held.process is not None:
                self._unpromise(held, epoch)

    def before(self, owner: DeviceId, job: JobId, epoch: int) -> list[Held]:
        """Stages of a job that did not go on to this epoch."""
        there = [h for h in self._of(job) if h.offer.owner == owner and h.offer.epoch < epoch]
        return [held for held in there if held.next_offer is None]

    def find(self, owner: DeviceId, place: Place) -> Held:
        """The stage granted to `owner`; refuses anybody else and any other epoch. Where the device
        let go of the job, as when its owner seemed gone for a moment, another epoch may mend it.
        """
        held = self._held.get(place)
        if held is not None and held.offer.owner == owner:
            return held
        there = list(self._of(place.job))
        if not there:
            raise StaleEpochError(f"this device holds no stage of job {place.job} any more")
        others = {h.offer.epoch for h in there if h.offer.owner == owner}
        if others and place.epoch not in others:
            raise StaleEpochError(
                f"job {place.job} is in epoch {max(others)} here, not {place.epoch}"
            )
        raise ProtocolError(f"this device holds no such stage of job {place.job} for that owner")

    def of_epoch(self, owner: DeviceId, job: JobId, epoch: int) -> list[Held]:
        """All stages of a job in one epoch; none if the job is not here at all."""
        there = list(self._of(job))
        if not there:
            return []
        found = [h for h in there if h.offer.epoch == epoch and h.offer.owner == owner]
        if not found:
            self.find(owner, Place(job, epoch, -1))  # says what is wrong
        return found

    def of_owner(self, owner: DeviceId) -> list[Held]:
        """All stages of a device's jobs."""
        return [held for held in self._held.values() if held.offer.owner == owner]

    def remove(self, held: Held) -> None:
        """Forget a stage."""
        held.released = True
        if self._held.get(place_of(held.offer)) is held:
            del self._held[place_of(held.offer)]

    def forget_expired(self, now: float) -> None:
        """What was granted and never started."""
        for held in list(self._held.values()):
            if held.expires < now:
                epoch = (held.next_offer or held.offer).epoch
                self._unpromise(held, epoch)

    def _of(self, job: JobId) -> Iterator[Held]:
        return (held for held in list(self._held.values()) if held.offer.job == job)

    def _forget_rounds_before(self, offer: Offer) -> None:
        for held in self._of(offer.job):
            promised = held.next_offer or held.offer
            if promised.round < offer.round:
                self._unpromise(held, offer.epoch)

    def _unpromise(self, held: Held, epoch: int) -> None:
        """A running stage goes on as it is, another one is forgotten."""
        if held.process is None:
            if held.offer.epoch == epoch:
                self.remove(held)
        elif held.next_offer is not None and held.next_offer.epoch == epoch:
            held.next_offer, held.expires = None, NEVER
