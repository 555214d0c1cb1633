"""The programs of a training job: static shapes [b, S], backward by torch's own autodiff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from confidantd.compiler import maths
from confidantd.compiler.program import Port, Program, Traced, Values, gradients, ports
from confidantd.compiler.tracing import unit_programs, whole_program
from confidantd.compiler.units import training_units
from confidantd.models.layout import embedding_layout, head_layout
from confidantd.models.parts import ROWS
from confidantd.models.spec import BlockSpec, ProgramRequest

IGNORED_LABEL = -100  # as in torch.nn.functional.cross_entropy


def _vjp(function: Callable[[Values], Tensor], values: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The value of `function`, and the function from its gradient to those of `values`."""
    found: Any = torch.func.vjp(function, values)
    return found[0], lambda gradient: found[1](gradient)[0]


def training_programs(request: ProgramRequest) -> list[Program | Traced]:
    """Every program of the request."""
    units = [p for unit in training_units(request) for p in unit_programs(unit, request)]
    if request.split:
        return [*units]
    programs: list[Program | Traced] = [_embedding_forward(request), *units, *_head(request)]
    if request.method == "full":
        programs.append(_embedding_backward(request))
    return programs


def _hidden(request: ProgramRequest, name: str, role: str = "activation") -> Port:
    shape = (request.microbatch_size, request.sequence_length, request.model.block.hidden)
    return Port(name, "gradient" if role == "gradient" else "activation", shape)


def _ids(request: ProgramRequest, name: str) -> Port:
    shape = (request.microbatch_size, request.sequence_length)
    return Port(name, "labels" if name == "labels" else "ids", shape, "int64")


def embed(ids: Tensor, weights: Values) -> Tensor:
    """Token vectors [B, S, D], plus those of positions 0..S-1 if they are learned."""
    x = functional.embedding(ids, weights["embedding.weight"])
    if "positions.weight" in weights:
        x = x + weights["positions.weight"][: ids.shape[1]]
    return x


def _embedding_forward(request: ProgramRequest) -> Program:
    return Program(
        "embedding_forward",
        (_ids(request, "ids"), *ports(embedding_layout(request.model))),
        (_hidden(request, "y"),),
        lambda values: {"y": embed(values["ids"], values)},
    )


def _embedding_backward(request: ProgramRequest) -> Program:
    layout = embedding_layout(request.model)

    def compute(values: Values) -> Values:
        # the gradient of a lookup does not depend on the table, so zeros stand in for it
        tables = {p.name: torch.zeros(p.shape) for p in layout}
        _, backward = _vjp(lambda t: embed(values["ids"], t), tables)
        found = backward(values["dy"])
        return {f"gradient.{name}": tensor for name, tensor in found.items()}

    inputs = (_hidden(request, "dy", "gradient"), _ids(request, "ids"))
    outputs = gradients(layout)
    return Program("embedding_backward", inputs, outputs, compute, differentiates=True)


def head_logits(x: Tensor, weights: Values, spec: BlockSpec) -> Tensor:
    """Logits [B, S, V] of hidden states x [B, S, D]."""
    return maths.norm(x, "norm", weights, spec) @ weights["head.weight"].t()


def next_token_loss(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of labels [B, S] one position ahead: the summed negative log-likelihood (nats; scalar),
    and its gradient by the logits [B, S, V], both times `scale`.

    The gradient of a cross-entropy is the softmax less one at the label. The last position
    has no label; it is computed and does not count, which costs less than a copy of the rest.
    """
    none = torch.full_like(labels[:, :1], IGNORED_LABEL)
    target = torch.cat([labels[:, 1:], none], 1)
    counted = target != IGNORED_LABEL
    target = torch.where(counted, target, 0).unsqueeze(-1)
    weight = counted * scale
    log_probabilities = torch.log_softmax(logits, -1)
    found = log_probabilities.gather(-1, target).squeeze(-1) * weight
    at_label = (torch.arange(logits.shape[-1]) == target).float()
    gradient = (log_probabilities.exp() - at_label) * weight.unsqueeze(-1)
    # over one axis: one of OpenVINO's builds cannot sum to a scalar
    return -found.reshape(1, -1).sum(1).squeeze(0), gradient


def _head(request: ProgramRequest) -> tuple[Program, Traced]:
    """For any number of rows R, so that rows may be shared out; losses and gradients add up."""
    spec, layout = request.model.block, head_layout(request.model)
    trained = [p.name for p in layout] if request.method == "full" else []

    def backward(values: Values) -> Values:
        moving = {name: values[name] for name in ("x", *trained)}
        logits, vjp = _vjp(lambda m: head_logits(m["x"], {**values, **m}, spec), moving)
        loss, gradient = next_token_loss(logits, values["labels"], values["scale"])
        found = vjp(gradient)
        named = {f"gradient.{name}": found[name] for name in trained}
        return {"loss": loss, "dx": found["x"]} | named

    def evaluate(values: Values) -> Values:
        logits = head_logits(values["x"], values, spec)
        return {"loss": next_token_loss(logits, values["labels"], torch.ones(()))[0]}

    hidden = (ROWS, request.sequence_length, request.model.block.hidden)
    x, weights = Port("x", "activation", hidden), ports(layout)
    labels = Port("labels", "labels", (ROWS, request.sequence_length), "int64")
    loss, scale = Port("loss", "loss", ()), Port("scale", "scale", ())
    found = gradients(layout if trained else ())
    return (
        Program(
            "head_loss",
            (x, labels, *weights),
            (loss,),
            evaluate,
        ),
        whole_program(
            "head_backward",
            (x, labels, scale, *weights),
            (loss, Port("dx", "gradient", hidden), *found),
            backward,
        ),
    )
