"""What a program from a peer may hold: the bytes are looked at before ONNX Runtime is."""

from __future__ import annotations

from pathlib import Path

import pytest

from confidantd.engine.onnx_bytes import matmul_model, number_field, varint
from confidantd.engine.onnx_bytes import part_field as field
from confidantd.engine.program_check import MAX_PROGRAM_BYTES, check_bytes, check_program
from confidantd.errors import CorruptFileError


def node(operator: bytes, *, domain: bytes = b"", attribute: bytes = b"") -> bytes:
    """A NodeProto in a graph."""
    inside = field(1, b"x") + field(4, operator) + (field(7, domain) if domain else b"")
    return field(1, inside + (field(5, attribute) if attribute else b""))


def model(*parts: bytes) -> bytes:
    """A ModelProto with one graph."""
    return field(7, b"".join(parts))


TENSOR = field(8, b"w") + field(9, bytes(8))
ELSEWHERE = field(8, b"w") + field(13, field(1, b"location") + field(2, b"/etc/passwd"))
EXTERNAL = field(8, b"w") + number_field(14, 1)


@pytest.mark.parametrize(
    "good",
    [
        matmul_model(),
        model(node(b"MatMul"), node(b"Add"), field(5, TENSOR)),
        model(node(b"Constant", attribute=field(1, b"value") + field(5, TENSOR))),
        model(node(b"Softmax", domain=b"ai.onnx")),
    ],
)
def test_arithmetic_is_let_through(good: bytes) -> None:
    check_bytes(good)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"", "0 graphs"),
        (model() + model(), "2 graphs"),
        (model(node(b"If")), "operator 'If'"),
        (model(node(b"Loop")), "operator 'Loop'"),
        (model(node(b"MatMul", domain=b"evil")), "evil:MatMul"),
        (model(node(b"MatMul") + node(b"PyOp")), "PyOp"),
        (model(field(1, field(4, b"Add") + field(4, b"PyOp"))), "PyOp"),
        (model(field(5, ELSEWHERE)), "another file"),
        (model(field(5, EXTERNAL)), "another file"),
        (model(node(b"Constant", attribute=field(5, ELSEWHERE))), "another file"),
        (model(node(b"Add", attribute=field(6, node(b"Add")))), "graphs in its nodes"),
        (model(node(b"Add", attribute=field(11, node(b"Add")))), "graphs in its nodes"),
        (model(field(15, b"")), "sparse"),
        (model() + field(25, b"f"), "functions"),
        (model() + field(20, b"t"), "functions"),
        (model()[:-1] + b"\x0a\x7f", "cut off"),
        (b"\x0b", "damaged"),
        (b"\x80" * 11, "damaged"),
        (number_field(7, 1), "damaged"),  # a graph that is a number
        # tags of more than 32 bits, which others read as a graph, or an operator
        (model(node(b"Add")) + varint((1 << 32) | (7 << 3 | 2)) + b"\x00", "damaged"),
        (bytes(MAX_PROGRAM_BYTES + 1), "too large"),
    ],
)
def test_everything_else_is_refused_with_its_reason(bad: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_bytes(bad)


def test_a_file_is_named_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "block"
    file.write_bytes(model(node(b"If")))
    with pytest.raises(CorruptFileError, match=r"block is not a program.*'If'") as caught:
        check_program(file)
    assert "update" in caught.value.hint
    with pytest.raises(CorruptFileError, match="cannot be read"):
        check_program(tmp_path / "absent")
