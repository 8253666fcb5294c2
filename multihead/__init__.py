"""multihead: one Transformer, four fields, five steps, on your own data.

Nothing heavy is imported until it is used: ``import multihead`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "train": "multihead.train",
    "load": "multihead.build:open_run",
    "Run": "multihead.build",
    "Task": "multihead.task",
    "Loss": "multihead.task",
    "Column": "multihead.data.rows",
    "Transformer": "multihead.generation.seq2seq",
    "LanguageModel": "multihead.tasks.language.text_generation",
    "TransformerConfig": "multihead.transformer.config",
    "UserError": "multihead.errors",
}
__all__ = ["__version__", *_PLACES]

if TYPE_CHECKING:
    from multihead.build import Run
    from multihead.build import open_run as load
    from multihead.data.rows import Column
    from multihead.errors import UserError
    from multihead.generation.seq2seq import Transformer
    from multihead.task import Loss, Task
    from multihead.tasks.language.text_generation import LanguageModel
    from multihead.train import train
    from multihead.transformer.config import TransformerConfig


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'multihead' has no attribute '{name}'")
    module_name, _, attribute = _PLACES[name].partition(":")
    module = importlib.import_module(module_name)
    value = module if name == "train" else getattr(module, attribute or name)  # that module can be called
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
