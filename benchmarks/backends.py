"""Blocks shared out between two execution providers, and each provider alone, beside torch.

Run from the project's folder: `python -m benchmarks.backends`. Together, two backends have
one thread each, pinned to a core each; what one alone can do is measured while the other
core does the same kind of work on the other backend, in turns with the split. What the
scheduler answers is compared with the best backend that has both threads. Alone, a
backend has one thread and the machine to itself, in turns with torch. `--picture FILE`
draws where heads and columns went and what it gained, as SVG.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.block_sides import LORA, BlockCase, TorchBlock
from benchmarks.engine_step import LENGTH, ROWS
from benchmarks.quiet import Quiet
from benchmarks.report import Claim, parser, report
from benchmarks.split_picture import draw
from benchmarks.split_shapes import TORCH_CORE, Shape, SplitBench, scheduled, two_backends
from benchmarks.step_sides import TorchStep, engine_step, step_model, step_programs
from benchmarks.windows import Side, interleave
from confidantd.engine.backends.base import Backend
from confidantd.engine.split.team import Team
from confidantd.jobs.plan_inputs import plan_workload
from confidantd.models.spec import LoraSpec
from confidantd.planner.memory import stage_memory
from confidantd.wire.jobs import PlanRequest

LAYERS = {768: 12, 2048: 2}  # of the training steps
ASKED = (128, 256, 384, 768, 2048)  # widths of blocks for which the scheduler is asked
VOCABULARIES = {768: 32_000, 2048: 4_000}  # four engines of the wide one must fit into memory
ROUNDS = 8
WINDOW_SECONDS = 0.5
REACH = {"attention": 0.90, "block": 0.85, "step": 0.85}
LEAST_GAIN, MOST_MISS = 0.98, 0.15
ALONE_REACH = {"full": (0.85, 0.95), "lora": (0.90, 1.00)}
RECOMPUTE_REACH, MEMORY_REACH = 0.75, 0.10


def together(backends: Sequence[Backend], hidden: int, rounds: int) -> Iterator[Shape]:
    """Attention, block and step of one width."""
    bench = SplitBench(hidden, backends)
    shapes = list(bench.shapes(rounds, WINDOW_SECONDS))
    bench.close()
    yield from shapes
    yield step_together(backends, hidden, rounds, shapes[-1])


def step_together(backends: Sequence[Backend], hidden: int, rounds: int, block: Shape) -> Shape:
    """A training step split over both, on each alone with the other core busy, and by torch."""
    layers = LAYERS[hidden]
    vocabulary = VOCABULARIES[hidden]
    with step_model(hidden, layers, vocabulary) as model:
        split = engine_step(model, backends, split="always")
        alone = [engine_step(model, [backend]) for backend in backends]
        sides = {
            "split": Side(split.run),
            "alone": Side(alone[0].run, 0, alone[1].run, 1),
            "torch": Side(
                TorchStep(hidden, layers, vocabulary, lora=False).run, TORCH_CORE, alone[1].run, 1
            ),
        }
        interleave(sides, max(3, rounds // 2), 2 * WINDOW_SECONDS)
        split.stage.close()
    single = (sides["alone"].median, sides["alone"].companion_median)
    names = [backend.name for backend in backends]
    return Shape(
        hidden, "step", sides["split"].median, dict(zip(names, single, strict=True)),
        sides["torch"].median, None, block.shares,
    )  # fmt: skip


def answers(shapes: Sequence[Shape]) -> Iterator[Claim]:
    """What the scheduler answers is not slower than the best backend alone with all threads."""
    for shape in shapes:
        shares = ", ".join(f"{name} {h} heads" for name, (h, _) in shape.shares.items())
        times = ", ".join(f"{n} {1e3 * s:.2f}" for n, s in shape.single_seconds.items())
        detail = f"{shares}: {1e3 * shape.split_seconds:.2f} ms; alone: {times}"
        yield Claim(f"{shape.name}: times the best backend alone with both threads", shape.gain,
                    LEAST_GAIN, "x", detail, at_most=False)  # fmt: skip


def prediction(shapes: Sequence[Shape]) -> Claim:
    """Predicted time of the chosen way against the measured one."""
    misses = {
        s.name: abs(s.predicted_seconds / s.split_seconds - 1)
        for s in shapes
        if s.predicted_seconds is not None
    }
    listed = ", ".join(f"{name} {100 * miss:.0f} %" for name, miss in misses.items())
    return Claim("predicted time of the chosen split, median miss",
                 statistics.median(misses.values()), MOST_MISS, "", listed)  # fmt: skip


def split_claims(shapes: Sequence[Shape]) -> Iterator[Claim]:
    """Gains against the ideal, the best single backend and torch."""
    for shape in shapes:
        times = ", ".join(f"{n} {1e3 * s:.0f}" for n, s in shape.single_seconds.items())
        detail = (
            f"split {1e3 * shape.split_seconds:.0f} ms; alone, other core busy: {times}; "
            f"torch {1e3 * shape.torch_seconds:.0f}; ideal {shape.ideal:.2f}x"
        )
        share = shape.gain / shape.ideal
        if shape.half_shares:
            forward, backward = shape.half_shares
            detail += f"; share in forward {forward:.2f}, in backward {backward:.2f}"
        yield Claim(f"{shape.name}: share of the ideal gain", share, REACH[shape.unit], "",
                    detail, at_most=False)  # fmt: skip
        yield Claim(f"{shape.name}: times the best single backend", shape.gain, LEAST_GAIN, "x",
                    at_most=False)  # fmt: skip
        yield Claim(f"{shape.name}: times torch eager, one thread",
                    shape.torch_seconds / shape.split_seconds, 1.0, "x",
                    at_most=False)  # fmt: skip


def alone(backends: Sequence[Backend], rounds: int) -> Iterator[Claim]:
    """Each backend with one thread against torch with one: block and step, full and LoRA."""
    for method, lora in (("full", None), ("lora", LORA)):
        for unit, sides in (
            ("block", block_sides(backends, lora, rounds)),
            ("step", step_sides(backends, lora, rounds)),
        ):
            seconds = {name: side.median for name, side in sides.items()}
            beside = {name: seconds["torch"] / s for name, s in seconds.items()}
            detail = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in seconds.items())
            best = max(beside[backend.name] for backend in backends)
            cpu_reach, best_reach = ALONE_REACH[method]
            yield Claim(f"{unit} of 134M, {method}: CPU provider, times torch", beside["cpu"],
                        cpu_reach, "x", detail, at_most=False)  # fmt: skip
            yield Claim(f"{unit} of 134M, {method}: best provider, times torch", best,
                        best_reach, "x", at_most=False)  # fmt: skip
            yield Claim(f"{unit}, {method}: recompute form, times saved form",
                        seconds["cpu"] / seconds["recompute"], RECOMPUTE_REACH, "x",
                        at_most=False)  # fmt: skip


def block_sides(backends: Sequence[Backend], lora: LoraSpec | None, rounds: int) -> dict[str, Side]:
    """One block, timed in turns."""
    case, again = BlockCase.make(768, lora), BlockCase.make(768, lora, "recompute")
    sides = {"torch": Side(TorchBlock(768, lora=lora is not None).whole)}
    teams = [Team([backend], case.programs, 1, Quiet()) for backend in backends]
    for backend, team in zip(backends, teams, strict=True):
        sides[backend.name] = Side(case.fused(team, backend.name))
    sides["recompute"] = Side(again.fused(teams[0], backends[0].name))
    interleave(sides, rounds, WINDOW_SECONDS)
    for team in teams:
        team.close()
    return sides


def step_sides(backends: Sequence[Backend], lora: LoraSpec | None, rounds: int) -> dict[str, Side]:
    """One training step of the 134M model, timed in turns."""
    with step_model(768, LAYERS[768], VOCABULARIES[768]) as model:
        reference = TorchStep(768, LAYERS[768], VOCABULARIES[768], lora=lora is not None)
        sides = {"torch": Side(reference.run)}
        for backend in backends:
            sides[backend.name] = Side(engine_step(model, [backend], lora=lora).run)
        again = engine_step(model, backends[:1], lora=lora, form="recompute")
        sides["recompute"] = Side(again.run)
        interleave(sides, max(3, rounds // 2), 2 * WINDOW_SECONDS)
    return sides


def memory() -> Claim:
    """Peak memory of a process in each form against what the memory model says."""
    layers = LAYERS[768]
    with step_model(768, layers, VOCABULARIES[768]) as model:
        request = PlanRequest(
            "benchmark", 0, "", model.spec, "train", "full", None, ROWS, 1, LENGTH, ()
        )
        work = plan_workload(request)
        programs = [f"{name}={path}" for name, path in step_programs(model, None).items()]
        peaks = {}
        for form in ("saved", "recompute"):
            command = [sys.executable, "-m", "benchmarks.step_memory", str(model.path), form]
            done = subprocess.run(  # noqa: S603 - this project's own module
                [*command, *programs], capture_output=True, text=True, check=True
            )
            peaks[form] = int(done.stdout.split()[-1])
    ends = {"embedding": True, "head": True, "stage": 0, "stages": 1}
    saved, recompute = (
        stage_memory(work, layers, form=form, **ends).total for form in ("saved", "recompute")
    )
    said = saved - recompute
    more = peaks["saved"] - peaks["recompute"]
    detail = f"measured {more / 1e6:.0f} MB more, the memory model says {said / 1e6:.0f} MB"
    return Claim("saved form's extra memory, miss of the model", abs(more / said - 1),
                 MEMORY_REACH, "", detail)  # fmt: skip


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--picture", type=Path, metavar="FILE", help="draw the split as SVG")
    return made.parse_args()


def claims(backends: Sequence[Backend], *, quick: bool, picture: Path | None) -> Iterator[Claim]:
    """All claims; with `quick` only one width, and no training steps beside it."""
    shapes: list[Shape] = []
    for shape in measured(backends, quick=quick):
        shapes.append(shape)
        yield from split_claims([shape])
    if picture is not None:
        picture.write_text(draw(shapes))
    if quick:
        yield prediction(shapes)
        return
    asked = [scheduled(hidden, backends, ROUNDS, WINDOW_SECONDS) for hidden in ASKED]
    yield from answers(asked)
    yield prediction([*shapes, *asked])
    yield from alone(backends, ROUNDS)
    yield memory()


def measured(backends: Sequence[Backend], *, quick: bool) -> Iterator[Shape]:
    """The split of every width beside each backend alone."""
    if quick:
        bench = SplitBench(768, backends)
        yield from bench.shapes(3, WINDOW_SECONDS)
        bench.close()
        return
    for hidden in LAYERS:
        yield from together(backends, hidden, ROUNDS)


def main() -> int:
    """Prints the claims as they are measured."""
    chosen = _options()
    torch.set_num_threads(1)
    disable_progress_bar()
    found = claims(two_backends(), quick=chosen.quick, picture=chosen.picture)
    return report(found, as_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
