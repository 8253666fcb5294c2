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

if TYPE_CHECKING:  # for readers and type checkers: the names as they are once asked for
    from multihead.build import Run as Run
    from multihead.data.rows import Column as Column
    from multihead.errors import UserError as UserError
    from multihead.generation.seq2seq import Transformer as Transformer
    from multihead.task import Loss as Loss
    from multihead.task import Task as Task
    from multihead.tasks.language.text_generation import LanguageModel as LanguageModel
    from multihead.train import train as train
    from multihead.transformer.config import TransformerConfig as TransformerConfig


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
