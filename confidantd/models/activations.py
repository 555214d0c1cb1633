"""Names of activation functions in `config.json`."""

from __future__ import annotations

from confidantd.errors import UnsupportedArchitectureError
from confidantd.models.config import Config
from confidantd.models.spec import Activation

_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation_of(config: Config, key: str, default: str) -> Activation:
    """The activation that the setting `key` names; an error lists those that there are."""
    name = config.text(key, default)
    if name not in _NAMES:
        raise UnsupportedArchitectureError(
            f"{config.where}: {key} = {name!r:.40} is not supported",
            f"supported: {', '.join(sorted(_NAMES))}",
        )
    return _NAMES[name]
