"""Which programs a job needs, and the key under which they are cached."""

from __future__ import annotations

import dataclasses
import json

from confidantd.ids import Digest, digest_of
from confidantd.models.spec import ProgramRequest
from confidantd.models.tensors import block_parameters
from confidantd.wire.codec import to_map

COMPILER_VERSION = "12"  # raise it whenever the compiler would write other programs

LEAST_SPLIT_FLOPS = 1e8  # of a block's forward: under 1 ms on a phone's core, less than a join
LEAST_SPLIT_PARAMETERS = 5e6  # of a block in generation: a token reads them once, in 1 to 4 ms

_TRAIN = (
    "embedding_forward",
    "block_forward",
    "block_recompute",
    "block_backward",
    "head_loss",
    "head_backward",
)
_TRAIN_SPLIT = (
    "attention_forward",
    "attention_backward",
    "mlp_forward",
    "mlp_recompute",
    "mlp_backward",
)
_GENERATE_SPLIT = ("attention_decode", "mlp_decode")
_GENERATE = ("embedding_decode", "block_decode", "head_logits")


def canonical_request(request: ProgramRequest) -> ProgramRequest:
    """The request without what does not change a program, so that more jobs share them."""
    model = dataclasses.replace(request.model, layers=1, end_tokens=(), tied=False, max_positions=0)
    if request.model.positions == "learned":
        model = dataclasses.replace(model, max_positions=request.model.max_positions)
    if request.purpose == "generate":
        return ProgramRequest(model, "generate", split=request.split)
    lora = request.lora if request.method == "lora" else None
    if lora is not None:
        lora = dataclasses.replace(lora, targets=tuple(sorted(set(lora.targets))))
    return dataclasses.replace(request, model=model, lora=lora)


def request_key(request: ProgramRequest) -> Digest:
    """Equal for requests that give the same programs with this version of the compiler."""
    plain = [COMPILER_VERSION, to_map(canonical_request(request))]
    return digest_of(json.dumps(plain, sort_keys=True).encode())


def program_names(request: ProgramRequest) -> tuple[str, ...]:
    """The programs of a request."""
    if request.purpose == "generate":
        return _GENERATE_SPLIT if request.split else _GENERATE
    if request.split:
        return _TRAIN_SPLIT
    return _TRAIN


def worth_splitting(request: ProgramRequest) -> bool:
    """Whether blocks are so large that several backends could share one."""
    if request.purpose == "generate":
        return block_parameters(request.model) >= LEAST_SPLIT_PARAMETERS
    tokens = request.microbatch_size * request.sequence_length
    return 2 * tokens * block_parameters(request.model) >= LEAST_SPLIT_FLOPS
