"""Options that only make sense together."""

from __future__ import annotations

import pytest

from confidantd.errors import UsageError
from confidantd.jobs.options import check_layers


@pytest.mark.parametrize(
    ("devices", "layers", "message"),
    [
        (("a",), (2, 4), "2 numbers for 1 devices"),
        ((), (6,), "1 numbers for 0 devices"),
        (("a", "a"), (3, 3), "2 numbers for 1 devices"),
        (("a", "b"), (2, 3), "add up to 5, the model has 6"),
        (("a", "b"), (0, 6), "one layer at least"),
    ],
)
def test_layers_must_suit_devices_and_model(
    devices: tuple[str, ...], layers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_layers(devices, layers, 6)


def test_layers_that_suit_and_none_are_fine() -> None:
    check_layers(("a", "b"), (2, 4), 6)
    check_layers(("a",), (), 6)
