"""LoRA training and merging compute what `peft` computes, and both read each other's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from confidantd.models.adapter import adapter_config, read_adapter
from confidantd.models.folder import ModelFolder
from confidantd.models.safetensors import Piece, write_file
from confidantd.models.spec import LoraSpec
from tests.component.engine_models import (
    Adapter,
    Pipeline,
    decoder,
    make_model,
    random_ids,
    save_model,
    training_pipeline,
)
from tests.component.test_engine_training import assert_close, batch, reference_loss

RATE, MOST_NORM = 1e-2, 0.2
TARGETS = {"llama": ["q_proj", "o_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"]}
KINDS = tuple(TARGETS)


def peft_model(kind: str, folder: Path) -> Any:
    """A `peft` model whose adapter is random in both factors; saved into `folder`."""
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=TARGETS[kind],
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(make_model(kind), config)  # type: ignore[arg-type]
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


def prepared(kind: str, folder: Path) -> tuple[Any, ModelFolder, Adapter]:
    """The reference, the model folder, and the adapter that the reference saved."""
    model = save_model(kind, folder / "model")
    reference = peft_model(kind, folder / "adapter")
    return reference, model, Adapter(*read_adapter(folder / "adapter", model.spec))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [1, 3])
def test_steps_from_an_adapter_equal_peft(tmp_path: Path, kind: str, stages: int) -> None:
    """Loss curve, gradient norm and final factors."""
    reference, model, adapter = prepared(kind, tmp_path)
    pipeline = training_pipeline(model, stages, adapter=adapter)
    moving = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(moving.values()), lr=RATE, weight_decay=0.0)
    for step in range(4):
        ids, labels = batch(step, 2)
        wanted = reference_loss(reference, ids, labels)
        optimizer.zero_grad()
        wanted.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(list(moving.values()), MOST_NORM)
        optimizer.step()
        assert pipeline.step(ids, labels, RATE, MOST_NORM) == pytest.approx(wanted.item(), rel=1e-5)
        assert pipeline.norms[-1] == pytest.approx(norm.item(), rel=1e-5)
    found = pipeline.trained()
    named = {name.replace(".default.", "."): p for name, p in moving.items()}
    assert found.keys() == named.keys()
    for name, parameter in named.items():
        assert_close(found[name], parameter.detach().numpy(), name, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [1, 3])
def test_merged_adapter_gives_the_logits_of_peft(tmp_path: Path, kind: str, stages: int) -> None:
    """Generation with an adapter."""
    reference, model, adapter = prepared(kind, tmp_path)
    ids = random_ids(3, 9)
    with torch.no_grad():
        wanted = reference(torch.from_numpy(ids[None])).logits[0, -1].numpy()
    assert_close(decoder(model, stages, adapter).logits(ids), wanted, "logits", 1e-5)


def save_adapter(pipeline: Pipeline, model: ModelFolder, lora: LoraSpec, folder: Path) -> None:
    """Write the trained adapter as a `peft` folder."""
    folder.mkdir()
    config = adapter_config(model.spec, lora, str(model.path))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pieces = [Piece(n, "F32", a.shape, a.tobytes()) for n, a in pipeline.trained().items()]
    write_file(folder / "adapter_model.safetensors", pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_a_trained_adapter(tmp_path: Path, kind: str) -> None:
    """Train a fresh adapter, save it, and let `peft` compute with it."""
    model = save_model(kind, tmp_path / "model")
    lora = LoraSpec(4, 10.0, tuple(TARGETS[kind]))
    pipeline = training_pipeline(model, 2, adapter=Adapter(lora))
    ids, labels = batch(0, 1)
    for _ in range(3):
        pipeline.step(ids, labels, RATE, MOST_NORM)
    save_adapter(pipeline, model, lora, tmp_path / "adapter")

    reference: Any = PeftModel.from_pretrained(make_model(kind), tmp_path / "adapter")  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = reference_loss(reference.eval(), ids, labels).item()
    assert pipeline.gradients(ids, labels) == pytest.approx(wanted, rel=1e-5)
    assert wanted < reference_loss(make_model(kind), ids, labels).item()
    assert read_adapter(tmp_path / "adapter", model.spec)[0].rank == 4


def test_fresh_adapter_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    """The same factors on any partition; A within peft's bound, B zero."""
    model = save_model("llama", tmp_path)
    adapter = Adapter(LoraSpec(4, 10.0, tuple(TARGETS["llama"])))
    one, three, other = (
        training_pipeline(model, stages, adapter=adapter, seed=seed).trained()
        for stages, seed in ((1, 0), (3, 0), (1, 1))
    )
    assert one.keys() == three.keys()
    drawn = [name for name in one if "lora_A" in name]
    for name in one:
        assert np.array_equal(one[name], three[name])
        assert ("lora_A" in name) == bool(one[name].any())
    assert not any(np.array_equal(one[name], other[name]) for name in drawn)
    bound = 32**-0.5
    query = one[next(name for name in drawn if "q_proj" in name)]
    assert 0.8 * bound < np.abs(query).max() <= bound
    assert abs(float(query.std()) / (bound / 3**0.5) - 1) < 0.2
