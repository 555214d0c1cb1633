"""How much the forward of a block keeps for its backward in the saved form."""

from __future__ import annotations

from confidantd.models.spec import LoraSpec, ModelSpec
from confidantd.models.tensors import target_linears


def saved_floats(model: ModelSpec, lora: LoraSpec | None, rows: int, length: int) -> int:
    """Elements that one block saves of `rows` sequences of `length` tokens.

    What the compiler's cheapest cut keeps (confidantd/compiler/saving.py): the softmax,
    query, key and value, the hidden state between attention and MLP, the MLP's products
    before the activation, the heads' output where something trains on it, and the
    low-rank products of adapters. The block's input is kept anyway and not counted.
    """
    block, tokens = model.block, rows * length
    query, key = block.heads * block.head_dim, block.kv_heads * block.head_dim
    a_token = block.hidden + query + 2 * key + block.columns * (2 if block.gated else 1)
    targets = () if lora is None else target_linears(model, lora.targets)
    if lora is None or any(linear.name == "o" for linear in targets):
        a_token += query
    if lora is not None:
        a_token += lora.rank * len(targets)
    return tokens * a_token + rows * block.heads * length * length
