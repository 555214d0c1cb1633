"""Which cores and threads backends get that work at the same time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from confidantd.engine.backends.base import DeviceKind
from confidantd.engine.split.parts import Place, places

KINDS = st.lists(st.sampled_from(["gpu", "npu", "cpu"]), max_size=3)


def test_backends_on_the_cpu_share_its_cores() -> None:
    assert places(["cpu", "cpu"], 4, [0, 1, 2, 3]) == [Place((0, 1), 2), Place((2, 3), 2)]


def test_a_graphics_processor_is_fed_from_a_core_of_its_own() -> None:
    cores = list(range(8))
    assert places(["cpu", "gpu"], 8, cores) == [Place((0, 1, 2, 3, 4, 5, 6), 7), Place((7,), 1)]


def test_where_cores_are_few_none_is_set_aside() -> None:
    assert places(["cpu", "gpu"], 2, [0, 1]) == [Place((0, 1), 2), Place((), 1)]
    assert places(["cpu", "cpu"], 1, [0]) == [Place((), 1), Place((), 1)]


def test_a_cap_on_threads_holds() -> None:
    assert places(["cpu", "gpu"], 2, list(range(16)))[0].threads == 2


def test_where_the_system_does_not_tell_nothing_is_pinned() -> None:
    assert places(["cpu", "cpu", "npu"], 6, []) == [Place((), 3), Place((), 3), Place((), 1)]


@given(others=KINDS, threads=st.integers(1, 64), count=st.integers(0, 64))
def test_no_core_is_given_twice_and_no_thread_too_many(
    others: list[DeviceKind], threads: int, count: int
) -> None:
    """Backends on the CPU have a thread each: a team of more than that shares nothing."""
    kinds: list[DeviceKind] = ["cpu", *others]
    found = places(kinds, threads, range(count))
    given_away = [core for place in found for core in place.cores]
    assert len(given_away) == len(set(given_away))
    on_cpu = [place.threads for place, kind in zip(found, kinds, strict=True) if kind == "cpu"]
    assert min(on_cpu) >= 1
    if len(on_cpu) <= threads:
        assert sum(on_cpu) <= threads
