"""The weights of a training stage: what programs are fed, and what the optimizer changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from confidantd.engine.adamw import (
    CHUNK_ELEMENTS,
    SHARED_CHUNK_ELEMENTS,
    Moments,
    Step,
    square_sum,
    update,
)
from confidantd.engine.lora import load_factor
from confidantd.engine.tensors import Floats, Reader, load
from confidantd.models.adapter import adapter_sources
from confidantd.models.stage_parts import EMBEDDING, HEAD, Part, kept_parts
from confidantd.models.tensors import Source, block_sources, embedding_sources, head_sources
from confidantd.wire.stage import OptimizerSpec, StageSpec, parts_of

GRADIENT = "gradient."
State = Callable[[str], Floats | None]  # of a tensor's name in the checkpoint (or adapter)


class Trained:
    """A weight that is trained, its moments, and its gradient of this step so far.

    The gradient fills up by runs of rows, each known by its first row: a part of a block
    that runs elsewhere writes the rows of its heads or columns.
    """

    def __init__(self, source: Source, weight: Floats) -> None:
        self.source = source
        self.weight = weight
        self.moments = Moments(weight)
        self._gradient: Floats | None = None
        self._filled: set[int] = set()

    @property
    def gradient(self) -> Floats | None:
        """The sum of this step's gradients; None if there were none yet."""
        return self._gradient if self._filled else None

    def rows(self, first: int, past_last: int) -> Floats:
        """Rows of the gradient's memory, which is kept from step to step."""
        if self._gradient is None:
            self._gradient = np.empty_like(self.weight)
        return self._gradient[first:past_last]

    def empty(self, first: int) -> bool:
        """Whether nothing was added yet to the run that starts at `first`."""
        return first not in self._filled

    def add(self, gradient: Floats, first: int = 0) -> None:
        """Accumulate rows from `first` on; what was written to `rows` itself is there already."""
        shape = (-1, *self.weight.shape[1:])
        found = gradient.reshape(shape)
        target = self.rows(first, first + len(found))
        if not self.empty(first):
            target += found
        elif not np.shares_memory(target, found):
            target[...] = found
        self._filled.add(first)

    def accumulator(self) -> Floats:
        """This step's gradient so far, zeros if there is none, for who adds to it in place."""
        whole = self.rows(0, len(self.weight))
        if not self._filled:
            whole.fill(0.0)
            self._filled.add(0)
        return whole

    def clear(self) -> None:
        """Start the next step."""
        self._filled.clear()

    def state(self) -> tuple[Floats, Floats, Floats]:
        """All that another device needs to go on: weight and moments, flat."""
        return self.weight.reshape(-1), self.moments.first, self.moments.second

    def restore(self, state: Floats) -> None:
        """Go on from [3, size]: what `state` gave elsewhere."""
        for mine, found in zip(self.state(), state, strict=True):
            mine[...] = found


@dataclass(slots=True)
class Group:
    """The weights of one block (or embedding, or head) by program input name."""

    weights: dict[str, Floats] = field(default_factory=dict)
    trained: dict[str, Trained] = field(default_factory=dict)

    def accumulators(self) -> dict[str, Floats]:
        """This step's gradients so far by weight, for a program that adds to them in place."""
        return {name: trained.accumulator() for name, trained in self.trained.items()}

    def add_gradients(self, outputs: dict[str, Floats]) -> None:
        """Accumulate the outputs called `gradient.<weight>`."""
        for name, array in outputs.items():
            if name.startswith(GRADIENT):
                self.trained[name.removeprefix(GRADIENT)].add(array)


def no_state(_: str) -> Floats | None:
    """Of a job that begins: everything comes from the checkpoint."""
    return None


class StageWeights:
    """Every weight of a training stage; a tied table that is both ends exists once.

    `state` gives what another device trained of a tensor, [3, size], which then counts
    instead of the checkpoint's. What `old`, the weights of the stage this device held
    before, has in common with this one is taken over from there; the rest of it is dropped.
    """

    def __init__(
        self,
        spec: StageSpec,
        read: Reader,
        read_adapter: Reader | None,
        state: State = no_state,
        old: StageWeights | None = None,
    ) -> None:
        self._spec, self._state = spec, state
        self._by_name: dict[str, Trained] = {}
        kept = {} if old is None else old.taken(parts_of(spec), tied=spec.model.tied)
        self.embedding = kept.get(EMBEDDING) or self._group(
            embedding_sources(spec.model), read, there=spec.embedding
        )
        self.blocks = [
            kept.get(layer) or self._block(layer, read, read_adapter)
            for layer in range(spec.first_layer, spec.past_last_layer)
        ]
        self.head = Group()
        if spec.head:
            self.head = kept.get(HEAD) or self._head(read)
        for group in kept.values():
            self._by_name |= {t.source.name: t for t in group.trained.values()}
        for name, trained in self._by_name.items():
            found = state(name)
            if found is not None:  # of what was kept, too, when the job goes back some steps
                trained.restore(found)

    def drop_gradients(self) -> None:
        """Of a step that does not end."""
        for trained in self._by_name.values():
            trained.clear()

    def taken(self, wanted: frozenset[Part], *, tied: bool) -> dict[Part, Group]:
        """Groups that a stage with the parts `wanted` goes on with; these weights lose all."""
        spec = self._spec
        layers = range(spec.first_layer, spec.past_last_layer)
        groups: dict[Part, Group] = dict(zip(layers, self.blocks, strict=True))
        groups |= {EMBEDDING: self.embedding, HEAD: self.head}
        keep = kept_parts(parts_of(spec), wanted, tied=tied)
        self.blocks, self.embedding, self.head = [], Group(), Group()
        self._by_name.clear()
        return {part: group for part, group in groups.items() if part in keep}

    def _group(self, sources: Iterable[Source], read: Reader, *, there: bool) -> Group:
        group = Group()
        for source in sources if there else ():
            if self._spec.training == "full":
                state = self._state(source.name)
                array = np.empty(source.parameter.shape, np.float32)
                if state is None:
                    array = load(source, read, writable=True)
                self._train(group, source, array)
            else:
                group.weights[source.parameter.name] = load(source, read, writable=False)
        return group

    def _train(self, group: Group, source: Source, array: Floats) -> None:
        trained = Trained(source, array)
        group.weights[source.parameter.name] = array
        group.trained[source.parameter.name] = trained
        self._by_name[source.name] = trained

    def _block(self, layer: int, read: Reader, read_adapter: Reader | None) -> Group:
        model, lora = self._spec.model, self._spec.lora
        group = self._group(block_sources(model, layer), read, there=True)
        if self._spec.training == "lora" and lora is not None:
            for source in adapter_sources(model, lora, layer):
                array = load_factor(source, read_adapter, self._spec.seed)
                self._train(group, source, array)
        return group

    def _head(self, read: Reader) -> Group:
        *norm, table = head_sources(self._spec.model)
        group = self._group(norm, read, there=True)
        if self._spec.model.tied and self._spec.embedding:
            group.weights["head.weight"] = self.embedding.weights["embedding.weight"]
            if self._spec.training == "full":
                group.trained["head.weight"] = self.embedding.trained["embedding.weight"]
            return group
        rest = self._group((table,), read, there=True)
        return Group(group.weights | rest.weights, group.trained | rest.trained)

    def states(self, parts: frozenset[Part]) -> Iterator[tuple[Source, tuple[Floats, ...]]]:
        """Trained tensors of some parts with their moments, for another device to go on with."""
        spec = self._spec
        layers = range(spec.first_layer, spec.past_last_layer)
        groups: list[tuple[Part, Group]] = [*zip(layers, self.blocks, strict=True)]
        groups += [(EMBEDDING, self.embedding), (HEAD, self.head)]
        found = {
            trained.source.name: trained
            for part, group in groups
            if part in parts
            for trained in group.trained.values()
        }
        return ((trained.source, trained.state()) for trained in found.values())

    def tied_end(self) -> Trained | None:
        """The trained table whose other end is on another stage."""
        spec = self._spec
        if not spec.model.tied or spec.training != "full" or spec.embedding == spec.head:
            return None
        if spec.embedding:
            return self.embedding.trained["embedding.weight"]
        return self.head.trained["head.weight"]

    def _own(self) -> Iterator[Trained]:
        """Trained weights; the tied table belongs to the embedding stage."""
        foreign = None if self._spec.embedding else self.tied_end()
        return (trained for trained in self._by_name.values() if trained is not foreign)

    def gradient_square_sum(self) -> float:
        """Over the weights that belong to this stage, in float64."""
        return sum(square_sum(t.gradient) for t in self._own() if t.gradient is not None)

    def update(self, optimizer: OptimizerSpec, step: Step, threads: int = 1) -> None:
        """One AdamW step on every trained weight; drops the gradients."""
        chunk = CHUNK_ELEMENTS if threads == 1 else SHARED_CHUNK_ELEMENTS

        def one(t: Trained) -> None:
            if t.gradient is not None:
                update(t.weight, t.gradient, t.moments, optimizer, step, chunk)
                t.clear()

        largest_first = sorted(self._by_name.values(), key=lambda t: -t.weight.size)
        if threads == 1:
            for trained in largest_first:
                one(trained)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="optimizer") as pool:
                list(pool.map(one, largest_first))

    def results(self) -> Iterator[tuple[str, Floats]]:
        """Trained weights under their checkpoint names, in checkpoint layout."""
        for t in self._own():
            turned = t.weight.T if t.source.transposed else t.weight
            yield t.source.name, np.ascontiguousarray(turned)

    def trained_parameters(self) -> int:
        """How many numbers the optimizer changes."""
        return sum(trained.weight.size for trained in self._by_name.values())

    def resident_bytes(self) -> dict[str, int]:
        """Memory of weights (each array once), gradients at their fullest, and moments."""
        groups = (self.embedding, *self.blocks, self.head)
        arrays = {id(a): a.nbytes for group in groups for a in group.weights.values()}
        return {
            "weights": sum(arrays.values()),
            "gradients": sum(t.weight.nbytes for t in self._by_name.values()),
            "moments": sum(t.moments.bytes for t in self._by_name.values()),
        }
