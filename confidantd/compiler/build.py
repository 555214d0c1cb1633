"""All programs of a request, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from confidantd.compiler.export import export
from confidantd.compiler.generation import generation_programs
from confidantd.compiler.program import Program, Traced
from confidantd.compiler.training import training_programs
from confidantd.errors import CompileError
from confidantd.models.spec import ProgramRequest


def build(request: ProgramRequest) -> Iterator[tuple[int, int, str, bytes]]:
    """(programs done, programs in all, name, file content) after each program."""
    programs: Sequence[Program | Traced]
    if request.purpose == "train":
        programs = training_programs(request)
    else:
        programs = generation_programs(request)
    for index, program in enumerate(programs):
        try:
            data = export(program)
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as failure:
            raise CompileError(
                f"{program.name} could not be exported ({type(failure).__name__})",
                "install the torch version that this release was tested with",
            ) from failure
        yield index + 1, len(programs), program.name, data
