"""The starting values of a LoRA adapter, and merging one into weights."""

from __future__ import annotations

import hashlib

import numpy as np

from confidantd.engine.tensors import Floats, Reader, load
from confidantd.models.adapter import adapter_sources
from confidantd.models.layout import output_major
from confidantd.models.spec import LoraSpec, ModelSpec
from confidantd.models.tensors import Source


def initial_factor(source: Source, seed: int) -> Floats:
    """B is zero; A is uniform in +-1/sqrt(inputs), as `peft` draws it (Kaiming, a = sqrt 5).

    The draw depends on the seed and the tensor's name only, so not on the partition.
    """
    shape = source.parameter.shape
    if source.parameter.name.endswith(".lora_b"):
        return np.zeros(shape, np.float32)
    key = hashlib.sha256(f"{seed} {source.name}".encode()).digest()
    bound = shape[0] ** -0.5
    generator = np.random.default_rng(int.from_bytes(key, "big"))
    return generator.uniform(-bound, bound, shape).astype(np.float32)


def load_factor(source: Source, read: Reader | None, seed: int) -> Floats:
    """A factor of the adapter to start from, or of a fresh one."""
    if read is None:
        return initial_factor(source, seed)
    return load(source, read, writable=True)


def merge(
    weights: dict[str, Floats], spec: ModelSpec, lora: LoraSpec, layer: int, read: Reader
) -> None:
    """W += (alpha / rank) A B^T for every target of one block; `weights` become private copies."""
    factors = {
        source.parameter.name: load(source, read, writable=False)
        for source in adapter_sources(spec, lora, layer)
    }
    for name, a in factors.items():
        module, kind = name.split(".")
        if kind == "lora_a":
            delta = (a @ factors[f"{module}.lora_b"].T) * np.float32(lora.scale)  # [in, out]
            weight = np.array(weights[f"{module}.weight"])
            weight += delta.T if output_major(module) else delta
            weights[f"{module}.weight"] = weight
