"""The folders of the small networks that judge the zoo's samples: `config.json` and weights in half precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_CONFIG_NAME = "config.json"
_WEIGHTS_NAME = "model.safetensors"


def save_judge(judge: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` (weights in half precision).

    Args:
        judge: What to write.
        config: What its class needs to build it again; plain values.
        folder: Where to; made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    state = judge.state_dict()
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        folder / _WEIGHTS_NAME,
    )


def read_judge(folder: Path, fix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights that `save_judge` wrote.

    Args:
        folder: Of the network.
        fix: What to do where it is none, for the error.

    Raises:
        ValueError: The folder or one of its two files is missing.
    """
    config, weights = folder / _CONFIG_NAME, folder / _WEIGHTS_NAME
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(
                f"folder is {str(folder)!r} but {path.name} is not in it; allowed is a folder with {_CONFIG_NAME} and "
                f"{_WEIGHTS_NAME}. {fix}"
            )
    return json.loads(config.read_text()), load_file(weights)
