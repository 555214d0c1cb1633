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
from confidantd.models.parts import TOKENS
from confidantd.models.spec import ProgramRequest

IGNORED_LABEL = -100  # as in torch.nn.functional.cross_entropy
TABLE = "head.weight"


def _vjp(function: Callable[[Values], Tensor], values: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The value of `function`, and the function from its gradient to those of `values`."""
    found: Any = torch.func.vjp(function, values)
    return found[0], lambda gradient: found[1](gradient)[0]


def training_programs(request: ProgramRequest) -> list[Program | Traced]:
    """Every program of the request."""
    units = [p for unit in training_units(request) for p in unit_programs(unit, request)]
    if request.split:
        return [*units]
    return [_embedding_forward(request), *units, *head_programs(request)]


def embed(ids: Tensor, weights: Values) -> Tensor:
    """Token vectors [B, S, D], plus those of positions 0..S-1 if they are learned."""
    x = functional.embedding(ids, weights["embedding.weight"])
    if "positions.weight" in weights:
        x = x + weights["positions.weight"][: ids.shape[1]]
    return x


def _embedding_forward(request: ProgramRequest) -> Program:
    shape = (request.microbatch_size, request.sequence_length)
    return Program(
        "embedding_forward",
        (Port("ids", "ids", shape, "int64"), *ports(embedding_layout(request.model))),
        (Port("y", "activation", (*shape, request.model.block.hidden)),),
        lambda values: {"y": embed(values["ids"], values)},
    )


def next_token_loss(h: Tensor, values: Values) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of normed hidden states h [T, D] and labels [T], each the next token or ignored: the
    summed negative log-likelihood (nats; scalar); exponentials of the logits [T, V], less
    the largest of each token; their sums [T, 1]; and the head's rows of the labels [T, D].

    Written so that two tensors [T, V] are alive at most: the logit of the label is not
    picked from them, but multiplied once more.
    """
    logits = h @ values[TABLE].t()
    most = logits.amax(-1, keepdim=True)
    exponentials = torch.exp(logits - most)
    total = exponentials.sum(-1, keepdim=True)
    labels = torch.where(values["labels"] != IGNORED_LABEL, values["labels"], 0)
    rows = functional.embedding(labels, values[TABLE])
    losses = (most + torch.log(total) - (h * rows).sum(-1, keepdim=True)) * _weights(values)
    # over one axis: one of OpenVINO's builds cannot sum to a scalar
    return losses.reshape(1, -1).sum(1).squeeze(0), exponentials, total, rows


def _weights(values: Values) -> Tensor:
    """What each token's loss is multiplied by [T, 1]: the scale, or 0 where it has no label."""
    counted = (values["labels"] != IGNORED_LABEL).unsqueeze(-1).float()
    return counted * values["scale"] if "scale" in values else counted


def head_programs(request: ProgramRequest) -> tuple[Program, Traced]:
    """For any number of tokens T, so that they may come in chunks and be shared out: losses and
    gradients add up.

    The gradient of a cross-entropy by the logits is the softmax less one at the label. Its
    product with the table, and with the hidden states for the table's gradient, are each
    made of these two terms. The first is added to `sum.head.weight` within the product; the
    second is a row a token, `label_rows`, to subtract from the label's row.
    """
    spec, layout = request.model.block, head_layout(request.model)
    full = request.method == "full"
    norm = [p.name for p in layout if p.name != TABLE and full]

    def backward(values: Values) -> Values:
        moving = {name: values[name] for name in ("x", *norm)}
        h, vjp = _vjp(lambda m: maths.norm(m["x"], "norm", {**values, **m}, spec), moving)
        loss, exponentials, total, rows = next_token_loss(h, values)
        weight = _weights(values)
        found = vjp((exponentials @ values[TABLE]) * (weight / total) - rows * weight)
        named = {f"gradient.{name}": found[name] for name in norm}
        if full:
            named[f"gradient.{TABLE}"] = torch.addmm(
                values[f"sum.{TABLE}"], exponentials.t(), h * (weight / total)
            )
            named["label_rows"] = h * weight
        return {"loss": loss, "dx": found["x"]} | named

    def evaluate(values: Values) -> Values:
        h = maths.norm(values["x"], "norm", values, spec)
        return {"loss": next_token_loss(h, values)[0]}

    hidden = (TOKENS, spec.hidden)
    x, weights = Port("x", "activation", hidden), ports(layout)
    labels = Port("labels", "labels", (TOKENS,), "int64")
    loss, scale = Port("loss", "loss", ()), Port("scale", "scale", ())
    dx, inputs = Port("dx", "gradient", hidden), (x, labels, scale, *weights)
    outputs: tuple[Port, ...] = (loss, dx)
    if full:
        (table,) = (p for p in layout if p.name == TABLE)
        inputs = (*inputs, Port(f"sum.{TABLE}", "gradient", table.shape))
        outputs = (loss, dx, Port("label_rows", "gradient", hidden), *gradients(layout))
    return (
        Program("head_loss", (x, labels, *weights), (loss,), evaluate),
        whole_program("head_backward", inputs, outputs, backward),
    )
