"""What ``model.from`` means for a recipe: sizes and options come from the weights, and none may contradict them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from multihead.errors import Problem, UserError, tr
from multihead.strict_yaml import Source
from multihead.transformer.config import TRAINING_ONLY, TransformerConfig

SHAPE = tuple(field.name for field in fields(TransformerConfig))
EFFECTIVE = {"num_kv_heads": "kv_heads", "d_head": "head_size", "d_ff": "ff_size"}
"""Keys whose None stands for a number that follows from others."""


def origin(source: Source, problems: list[Problem]) -> Any:
    """The `multihead.weights.Origin` that ``model.from`` names; None where none is, or it cannot be read."""
    model = source.values.get("model")
    wish, where = model.get("from") if isinstance(model, dict) else None, source.place(("model", "from"))
    if not isinstance(wish, str) or any(p.where == where for p in problems):
        return None
    from multihead.weights import open_origin  # needs torch, which most recipes are read without

    try:
        return open_origin(wish)
    except UserError as error:
        problems += [Problem(f"model.from: {p.where + ': ' if p.where else ''}{p.message}", where)
                     for p in error.problems]
        return None


def suits(task: Any, origin: Any) -> bool:
    """Whether weights that read pictures, sound or texts are for a task that has any."""
    kinds, pictures = {column.kind for column in task.columns if not column.target}, {"image", "video"}
    if origin.reads != "text":
        return bool(kinds & ({"audio"} if origin.reads == "sound" else pictures))
    return not kinds or not kinds <= {*pictures, "audio"}


def defaults(task: Any, origin: Any) -> dict[str, Any]:
    """The lowest layers of a recipe: what the task prefers, and over it what the weights decide."""
    values: dict[str, Any] = {key: dict(section) for key, section in task.defaults.items()}
    if origin is not None and suits(task, origin):  # a task's own sizes are for models that begin from nothing
        free = {key: value for key, value in values.get("model", {}).items() if key in TRAINING_ONLY}
        values["model"] = {**free, **{key: value for key, value in origin.config.items() if key in SHAPE}}
        preferred = {key: value for key, value in origin.preferred.items() if key in task.Options.model_fields}
        values["options"] = {**values.get("options", {}), **preferred, **_options(task.Options, origin)}
    return values


def _options(known: Any, origin: Any) -> dict[str, Any]:
    """Options that the weights decide, of those that a task has."""
    return {key: value for key, value in origin.options.items() if key in known.model_fields}


def without_origin(values: dict[str, Any], source: Source) -> list[Problem]:
    """What only makes sense with weights to start from."""
    model, train = (values[k] if isinstance(values.get(k), dict) else {} for k in ("model", "train"))
    found = []
    if model.get("from") is None and model.get("lora") is not None:
        found.append(Problem(tr("lora adapts weights that are there already; name them with `from:`, or remove `lora:`",
                                "lora 用来调整已有的权重；请用 `from:` 指明权重，或删去 `lora:`"),
                             source.place(("model", "lora"))))
    if model.get("from") is None and train.get("steps") == 0 and train["steps"] is not False:
        found.append(Problem(tr("train.steps is 0; it must be ≥ 1 (or 0 with model.from, to take weights as they are)",
                                "train.steps 是 0；应为 ≥ 1（有 model.from 时可为 0，即原样使用权重）"),
                             source.place(("train", "steps"))))
    return found


def contradictions(recipe: Any, origin: Any, source: Source) -> list[Problem]:
    """Sizes and options that the recipe gives and that are not those of the weights."""
    theirs = TypeAdapter(type(recipe.model)).validate_python({k: v for k, v in origin.config.items() if k in SHAPE})
    # Tables of angles can be made for any length; learned positions have a weight for each.
    free = {*TRAINING_ONLY, *(() if recipe.model.positions == "learned" else ("max_length",))}
    found = []

    def compare(section: str, key: str, ours: Any, other: Any) -> None:
        if ours != other:
            where = source.place((section, key))
            found.append(Problem(tr(f"{section}.{key} is {ours}, but {origin.path} has {other}: remove the line",
                                    f"{section}.{key} 是 {ours}，而 {origin.path} 是 {other}：请删去这一行"), where))

    written = {section: source.values.get(section) or {} for section in ("model", "options")}
    for key in (key for key in SHAPE if key in written["model"] and key not in free):
        name = EFFECTIVE.get(key, key)
        compare("model", key, getattr(recipe.model, name), getattr(theirs, name))
    for key, value in _options(type(recipe.options), origin).items():
        if key in written["options"]:
            compare("options", key, getattr(recipe.options, key), value)
    return found
