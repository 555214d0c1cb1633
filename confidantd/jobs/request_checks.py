"""Limits of what a plan is asked for and what is offered: peers may ask for anything."""

from __future__ import annotations

from confidantd.errors import ProtocolError
from confidantd.wire.jobs import Offer, PlanRequest

MOST_LAYERS = 4_096
MOST_ROWS = 1 << 16  # sequences in a batch
MOST_TOKENS = 1 << 22  # of a sequence
MOST_DEVICES = 512
MOST_BYTES = 1 << 60


def check_request(request: PlanRequest) -> None:
    """ProtocolError for a request whose numbers would keep a coordinator busy for ever."""
    layers = request.model.layers
    numbers = (
        (layers, 1, MOST_LAYERS),
        (request.batch_size, 1, MOST_ROWS),
        (request.microbatches, 0, request.batch_size),
        (request.sequence_length, 1, MOST_TOKENS),
        (request.load, 0, MOST_ROWS),
    )
    if not all(least <= number <= most for number, least, most in numbers):
        raise ProtocolError("a plan is asked for with impossible sizes")
    lists = (request.devices, request.layers, request.current, request.without, request.links)
    if any(len(found) > MOST_DEVICES for found in lists):
        raise ProtocolError(f"a plan is asked for with more than {MOST_DEVICES} devices")
    current = [stage.layers for stage in request.current]
    if any(count < 0 for count in current) or sum(current) not in (0, layers):
        raise ProtocolError("the stages of a running job do not add up to its model")
    if any(not 0 <= stage.memory_bytes < MOST_BYTES for stage in request.current):
        raise ProtocolError("the stages of a running job have impossible sizes")


def check_offer(offer: Offer) -> None:
    """ProtocolError for an offer that cannot be meant."""
    places = 0 <= offer.stage < offer.stages <= MOST_DEVICES
    layers = 0 <= offer.first_layer <= offer.past_last_layer <= MOST_LAYERS
    if not (places and layers and 0 <= offer.memory_bytes < MOST_BYTES):
        raise ProtocolError("an offer has impossible sizes")
