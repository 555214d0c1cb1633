"""Shares of head groups and MLP columns: against brute force, and what must always hold."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.models.layout import block_layout, lora_layout
from confidantd.models.parts import PartParameter, attention_parameters, mlp_parameters
from confidantd.models.spec import LoraSpec, ModelSpec
from confidantd.models.tensors import possible_targets, target_linears
from confidantd.planner.heads import (
    LEAST_GAIN,
    MOST_PROBES,
    MOST_TILES,
    TILE_MULTIPLE,
    Alone,
    BlockSplit,
    Curve,
    Points,
    UnitSplit,
    best_split,
    choose,
    probes,
    seconds_at,
    tiles,
)
from confidantd.planner.split_choice import (
    BlockCurves,
    BlockProfile,
    choose_block,
    columns_of,
    from_json,
    shares_of,
    to_json,
)
from tests.unit.model_files import GPT2, LLAMA

NAMES = ("a", "b", "c", "d")
SECONDS = st.floats(1e-6, 10.0)
MOST_GROUPS = 12


def points(seconds: st.SearchStrategy[float] = SECONDS) -> st.SearchStrategy[Points]:
    """A measured curve: sizes in ascending order, seconds as noise would have them."""
    found = st.dictionaries(st.integers(1, MOST_GROUPS), seconds, min_size=1, max_size=5)
    return found.map(lambda sizes: tuple(sorted(sizes.items())))


@st.composite
def curves(draw: st.DrawFn, backends: int, seconds: st.SearchStrategy[Points]) -> tuple[Curve, ...]:
    """One of each backend."""
    return tuple(Curve(name, draw(seconds), draw(seconds)) for name in NAMES[:backends])


@st.composite
def profiles(draw: st.DrawFn) -> BlockProfile:
    """Whole blocks on each of some backends, and shares if there are at least two."""
    backends = draw(st.integers(1, 3))
    alone = tuple(Alone(name, draw(SECONDS), draw(SECONDS)) for name in NAMES[:backends])
    if backends == 1 or draw(st.booleans()):
        return BlockProfile(alone, None)
    attention, mlp = draw(curves(backends, points())), draw(curves(backends, points()))
    return BlockProfile(alone, BlockCurves(attention, mlp, draw(st.floats(0, 1))))


@st.composite
def ways(draw: st.DrawFn, total: int, backends: int) -> tuple[int, ...]:
    """Any way to share `total`."""
    cut = st.lists(st.integers(0, total), min_size=backends - 1, max_size=backends - 1)
    borders = [0, *sorted(draw(cut)), total]
    return tuple(b - a for a, b in itertools.pairwise(borders))


def every_way(total: int, backends: int) -> Iterator[tuple[int, ...]]:
    """All ways to share `total`, by recursion."""
    if backends == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in every_way(total - first, backends - 1):
            yield (first, *rest)


def line(measured: Points, size: int) -> float:
    """The seconds of a share by the definition: the two measured sizes around it, or nearest."""
    if size == 0:
        return 0.0
    if len(measured) == 1:
        ((only, seconds),) = measured
        return seconds * size / only
    below = [p for p in measured if p[0] < size] or [measured[0]]
    low = below[-1] if below[-1] != measured[-1] else measured[-2]
    high = measured[measured.index(low) + 1]
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return max(0.0, low[1] + slope * (size - low[0]))


def took(shares: Sequence[int], unit: Sequence[Curve], join: float) -> float:
    """Seconds of a unit: its slowest part forward and backward, and a join each if shared."""
    forward = max(line(c.forward, n) for c, n in zip(unit, shares, strict=True))
    backward = max(line(c.backward, n) for c, n in zip(unit, shares, strict=True))
    return forward + backward + (2 * join if active(shares) > 1 else 0)


def active(shares: Sequence[int]) -> int:
    """How many have a share."""
    return sum(share > 0 for share in shares)


@settings(deadline=None)
@given(
    data=st.data(),
    backends=st.integers(2, 4),
    total=st.integers(1, MOST_GROUPS),
    join=st.one_of(st.just(0.0), st.floats(0, 2)),
    least=st.integers(1, 4),
)
def test_as_good_as_brute_force(
    data: st.DataObject, backends: int, total: int, join: float, least: int
) -> None:
    unit = data.draw(curves(backends, points()))
    found = best_split(total, unit, join, least)
    assert sum(found.shares) == total
    assert min(found.shares) >= 0
    least = min(least, backends, total)
    assert active(found.shares) >= least
    every = [took(s, unit, join) for s in every_way(total, backends) if active(s) >= least]
    assert found.seconds == pytest.approx(min(every), rel=1e-9, abs=1e-12)
    assert found.seconds == pytest.approx(took(found.shares, unit, join), rel=1e-9, abs=1e-12)


@given(data=st.data(), backends=st.integers(2, 4), total=st.integers(1, 8), least=st.integers(1, 3))
def test_of_equals_fewer_backends_then_the_more_even(
    data: st.DataObject, backends: int, total: int, least: int
) -> None:
    """Whole seconds at every size: many ways tie exactly."""
    few = st.integers(1, 3).map(float)
    dense = st.lists(few, min_size=total, max_size=total).map(
        lambda seconds: tuple(enumerate(seconds, 1))
    )
    unit = data.draw(curves(backends, dense))
    found = best_split(total, unit, 0.0, least)

    def rank(shares: tuple[int, ...]) -> tuple[float, int, int]:
        return took(shares, unit, 0.0), active(shares), sum(n * n for n in shares)

    least = min(least, backends, total)
    every = [rank(s) for s in every_way(total, backends) if active(s) >= least]
    assert rank(found.shares) == min(every)


@given(total=st.integers(1, 70), backends=st.integers(1, 4))
def test_probes(total: int, backends: int) -> None:
    """Every way is one; every backend is measured; nobody waits for too many."""
    found = probes(total, backends)
    if backends == 1:
        assert found == ()
        return
    assert len(set(found)) == len(found)
    assert len(found) <= max(MOST_PROBES * (1 if backends == 2 else backends), backends)
    for shares in found:
        assert len(shares) == backends
        assert sum(shares) == total
        assert min(shares) >= 0
        assert active(shares) >= min(2, total)
    assert all(any(shares[i] for shares in found) for i in range(backends))
    if total > 1:
        largest = {max(shares[i] for shares in found) for i in range(backends)}
        assert largest == {total - 1}


@given(total=st.integers(2, 70))
def test_probes_of_two_hold_the_extremes_and_the_middle(total: int) -> None:
    found = probes(total, 2)
    assert {(1, total - 1), (total - 1, 1), (total // 2, total - total // 2)} <= set(found)


@given(measured=points(), size=st.integers(0, 2 * MOST_GROUPS))
def test_seconds_between_and_beyond_measured_sizes(measured: Points, size: int) -> None:
    found = seconds_at(measured, size)
    assert found >= 0
    assert found == pytest.approx(line(measured, size), rel=1e-9, abs=1e-12)
    if size in dict(measured):
        assert found == pytest.approx(dict(measured)[size], rel=1e-9)
    if size == 0:
        assert found == 0
    if len(measured) == 1:
        assert found * measured[0][0] == pytest.approx(measured[0][1] * size)
    around = [dict(measured)[n] for n in sorted(dict(measured), key=lambda n: abs(n - size))[:2]]
    if measured[0][0] <= size <= measured[-1][0] and len(measured) == 2:
        assert min(around) * (1 - 1e-9) <= found <= max(around) * (1 + 1e-9)


@given(columns=st.integers(1, 20_000))
def test_tiles(columns: int) -> None:
    found = tiles(columns)
    assert sum(found) == columns
    assert len(found) <= MOST_TILES
    assert all(width == found[0] and width % TILE_MULTIPLE == 0 for width in found[:-1])
    assert 0 < found[0] <= found[-1] or len(found) == 1
    assert len(found) == 1 or found[-1] < 2 * found[0]
    if columns >= 2 * TILE_MULTIPLE:
        assert len(found) > 1


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31])
def test_few_columns_are_one_tile(columns: int) -> None:
    assert tiles(columns) == (columns,)


UNITS = st.builds(UnitSplit, ways(6, 3), SECONDS, SECONDS)


@given(
    alone=st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=3),
    attention=st.none() | UNITS,
    mlp=st.none() | UNITS,
    gain=st.sampled_from([0.0, LEAST_GAIN, 0.3]),
)
def test_a_split_must_beat_the_best_alone(
    alone: list[tuple[float, float]],
    attention: UnitSplit | None,
    mlp: UnitSplit | None,
    gain: float,
) -> None:
    whole = [Alone(name, *seconds) for name, seconds in zip(NAMES, alone, strict=False)]
    best = min(a.forward_seconds + a.backward_seconds for a in whole)
    found = choose(whole, attention, mlp, NAMES[:3], gain)
    assert found.seconds <= best
    shared = attention is not None and mlp is not None
    if shared:
        used = [a + m for a, m in zip(attention.shares, mlp.shares, strict=True)]
        shared = active(used) > 1 and attention.seconds + mlp.seconds <= best * (1 - gain)
    if shared:
        assert found.alone is None
        assert (found.attention, found.mlp) == (attention.shares, mlp.shares)
        assert found.backends == NAMES[:3]
    else:
        assert {a.backend: a.seconds for a in whole}[found.alone] == found.seconds == best


@pytest.mark.parametrize(("seconds", "shared"), [(9.6, True), (9.8, False), (10.1, False)])
def test_a_split_that_only_ties_is_not_worth_it(seconds: float, shared: bool) -> None:
    whole = [Alone("a", 4.0, 6.0), Alone("b", 5.0, 6.0)]
    unit = UnitSplit((1, 1), seconds / 4, seconds / 4)
    assert (choose(whole, unit, unit, ("a", "b")).alone is None) == shared


@given(profile=profiles(), groups=st.integers(1, 8), columns=st.integers(1, 200))
def test_a_block_runs_as_it_is_asked_to(profile: BlockProfile, groups: int, columns: int) -> None:
    """`never`: on the fastest; `always`: shared as far as it goes round; `auto`: the better."""
    best = min(profile.alone, key=lambda a: a.seconds)
    never = choose_block(profile, groups, columns, "never")
    assert never == BlockSplit(best.backend, (), (), (), best.seconds)
    always = choose_block(profile, groups, columns, "always")
    auto = choose_block(profile, groups, columns)
    if profile.curves is None:
        assert never == always == auto
        return
    assert always.alone is None
    for shares, total in ((always.attention, groups), (always.mlp, len(tiles(columns)))):
        assert sum(shares) == total
        assert active(shares) >= min(2, total)
    assert auto.seconds <= never.seconds
    assert auto.alone in {None, best.backend}
    for split in (always, auto):
        if split.alone is None:
            join = profile.curves.join_seconds
            seconds = took(split.attention, profile.curves.attention, join)
            seconds += took(split.mlp, profile.curves.mlp, join)
            assert split.seconds == pytest.approx(seconds, rel=1e-9, abs=1e-12)


@given(profile=profiles(), left_out=st.sets(st.sampled_from(NAMES)))
def test_without_some_backends(profile: BlockProfile, left_out: set[str]) -> None:
    found = profile.without(left_out)
    assert found.backends == profile.backends - left_out
    assert found.without(left_out) == found
    assert profile.without(()) == profile
    if profile.curves is None or len(found.backends) < 2:
        assert found.curves is None
        return
    assert found.curves is not None
    for before, after in (
        (profile.curves.attention, found.curves.attention),
        (profile.curves.mlp, found.curves.mlp),
    ):
        assert after == tuple(c for c in before if c.backend not in left_out)


@given(profile=profiles())
def test_a_profile_is_read_back(profile: BlockProfile) -> None:
    assert from_json(to_json(profile)) == profile


JUNK = st.one_of(
    st.none(),
    st.sampled_from([math.nan, math.inf, -1.0, 10**400, "", "x", [], {}, [[]], [[0, 1.0]]]),
    st.lists(st.sampled_from([[3, 1.0], [1, 1.0]]), max_size=3),
)


@st.composite
def spoiled(draw: st.DrawFn, value: Any) -> Any:
    """The same with something in it replaced or left out."""
    if draw(st.integers(0, 3)) == 0 or not value or not isinstance(value, list | dict):
        return draw(JUNK)
    key = draw(st.sampled_from(range(len(value)) if isinstance(value, list) else sorted(value)))
    found = value.copy()
    if isinstance(found, dict) and draw(st.integers(0, 4)) == 0:
        del found[key]
    else:
        found[key] = draw(spoiled(value[key]))
    return found


@given(data=st.data(), profile=profiles())
def test_a_spoiled_profile_is_none_or_one_to_choose_by(
    data: st.DataObject, profile: BlockProfile
) -> None:
    """Nothing that a file may hold makes a block fail later."""
    found = from_json(json.dumps(data.draw(spoiled(json.loads(to_json(profile))))).encode())
    if found is not None:
        assert 0 <= choose_block(found, 3, 70).seconds < math.inf


@given(data=st.binary())
def test_bytes_are_no_profile(data: bytes) -> None:
    assert from_json(data) is None


PLACES: tuple[tuple[str | int, ...], ...] = (
    ("alone", 1, "forward_seconds"),
    ("curves", "mlp", 0, "backward", 0, 1),
    ("curves", "join_seconds"),
)


@pytest.mark.parametrize("seconds", [None, "x", [], {}, math.nan, math.inf, -1, 10**400])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_time_makes_no_profile(seconds: Any, place: tuple[str | int, ...]) -> None:
    unit = tuple(Curve(name, ((1, 0.1),), ((1, 0.2),)) for name in "ab")
    alone = tuple(Alone(name, 0.1, 0.2) for name in "ab")
    fields = json.loads(to_json(BlockProfile(alone, BlockCurves(unit, unit, 0.01))))
    assert from_json(json.dumps(fields).encode()) is not None
    *way, last = place
    functools.reduce(operator.getitem, way, fields)[last] = seconds
    assert from_json(json.dumps(fields).encode()) is None


@pytest.mark.parametrize("nested", [b"[" * 100_000, b'{"alone":' * 100_000])
def test_a_deep_file_is_no_profile(nested: bytes) -> None:
    assert from_json(nested) is None


@given(data=st.data(), columns=st.integers(1, 3000), backends=st.integers(1, 4))
def test_tiles_as_columns(data: st.DataObject, columns: int, backends: int) -> None:
    shares = data.draw(ways(len(tiles(columns)), backends))
    found = columns_of(shares, columns)
    assert sum(found) == columns
    assert [n > 0 for n in found] == [n > 0 for n in shares]


@given(
    data=st.data(),
    kv_heads=st.integers(1, 8),
    queries=st.integers(1, 4),
    columns=st.integers(1, 3000),
    backends=st.integers(2, 4),
)
def test_shares_by_backend(
    data: st.DataObject, kv_heads: int, queries: int, columns: int, backends: int
) -> None:
    """Query heads in whole groups; only those that have something to do."""
    attention = data.draw(ways(kv_heads, backends))
    mlp = data.draw(ways(len(tiles(columns)), backends))
    split = BlockSplit(None, NAMES[:backends], attention, mlp, 1.0)
    found = shares_of(split, kv_heads * queries, kv_heads, columns)
    wanted = [n for n, a, m in zip(NAMES, attention, mlp, strict=False) if a or m]
    assert [name for name, _, _ in found] == wanted
    assert all(heads % queries == 0 for _, heads, _ in found)
    assert sum(heads for _, heads, _ in found) == kv_heads * queries
    assert sum(width for _, _, width in found) == columns
    alone = BlockSplit("b", (), (), (), 1.0)
    assert shares_of(alone, kv_heads * queries, kv_heads, columns) == [
        ("b", kv_heads * queries, columns)
    ]


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """A Llama with grouped queries, or a GPT-2 with q, k and v in one matrix."""
    size, columns = draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 40))
    kv_heads, queries = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        heads = kv_heads * queries
        config = {
            **LLAMA,
            "hidden_size": draw(st.sampled_from([1, 2])) * heads * size,
            "head_dim": size,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": columns,
            "attention_bias": draw(st.booleans()),
            "mlp_bias": draw(st.booleans()),
        }
    else:
        config = {**GPT2, "n_head": kv_heads, "n_embd": kv_heads * size, "n_inner": columns}
    return spec_from_config(Config(config, "config.json"))


def rows_of(parameter: PartParameter, first: int, past_last: int) -> range:
    """Of its source, those of groups or columns [first, past last)."""
    start = parameter.first + first * parameter.rows
    return range(start, parameter.first + past_last * parameter.rows)


@given(data=st.data(), model=models(), backends=st.integers(1, 4))
def test_shares_hold_every_row_once(data: st.DataObject, model: ModelSpec, backends: int) -> None:
    """Each row of a sliced parameter is one share's; the rest all share, or the first takes."""
    lora = None
    if targets := data.draw(st.sets(st.sampled_from(possible_targets(model)))):
        lora = LoraSpec(data.draw(st.integers(1, 3)), 4.0, tuple(sorted(targets)))
    shapes = {p.name: p.shape for p in block_layout(model.block)}
    for linear in target_linears(model, lora.targets) if lora else ():
        assert lora is not None
        shapes |= {p.name: p.shape for p in lora_layout(linear, lora)}
    units = (
        (attention_parameters(model, lora), model.block.kv_heads),
        (mlp_parameters(model, lora), model.block.columns),
    )
    sources = [{parameter.source for parameter in unit} for unit, _ in units]
    assert sources[0] | sources[1] == shapes.keys()
    assert not sources[0] & sources[1]
    for unit, total in units:
        assert len({parameter.name for parameter in unit}) == len(unit)
        counts = data.draw(ways(total, backends))
        ends = [sum(counts[:i]) for i in range(backends + 1)]
        held = Counter[tuple[str, int]]()
        for parameter in unit:
            shape = shapes[parameter.source]
            for i, count in enumerate(counts):
                rows = rows_of(parameter, ends[i], ends[i + 1])
                held.update((parameter.source, row) for row in rows)
                view = math.prod(parameter.view_shape(count))
                expected = len(rows) if parameter.rows else shape[0]
                assert view == expected * math.prod(shape[1:])
            assert not (parameter.once and parameter.rows)
        sliced = {parameter.source for parameter in unit if parameter.rows}
        assert held == {(name, row): 1 for name in sliced for row in range(shapes[name][0])}
        whole = Counter(parameter.source for parameter in unit if not parameter.rows)
        assert set(whole.values()) <= {1}
        assert not sliced & whole.keys()
