"""Step 5, serve: trained runs behind one server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from multihead.build import Run, open_run
from multihead.errors import UserError, tr
from multihead.generation.fast import prepared
from multihead.generation.loop import Emitter


def serve_runs(
    paths: Sequence[str | Path],
    host: str | None = None,
    port: int | None = None,
    api_keys: Sequence[str] = (),
    device: str = "auto",
    precision: str | None = None,
) -> None:
    """Serve the runs at `paths` until SIGTERM or SIGINT. The first run's ``serve:`` section holds for all.

    Args:
        precision: of models that write texts, in place of each recipe's ``serve.precision``; see `prepared`.

    Raises:
        UserError: a run that is not there or not trained, two of one name, or the extra [serve] is not installed.
    """
    try:
        from multihead.serve.app import Served, create_app, run
    except ImportError as error:
        raise UserError(
            tr(
                f"serving needs {error.name}: pip install 'multihead[serve]'",
                f"部署需要 {error.name}：pip install 'multihead[serve]'",
            )
        ) from None
    runs = [open_run(path, device) for path in paths]
    names = unique_names(runs)
    settings = runs[0].recipe.serve
    changes = {
        k: v
        for k, v in (("host", host), ("port", port), ("api_keys", [*settings.api_keys, *api_keys]))
        if v is not None
    }
    settings = settings.model_copy(update=changes)
    served = [
        Served(name, r.task, quickened(r, precision or r.recipe.serve.precision), r.recipe.serve, examples(r))
        for name, r in zip(names, runs, strict=True)
    ]
    run(create_app(served, settings), settings.host, settings.port)


def quickened(run: Run, precision: str) -> nn.Module:
    """The run's model as it is served: one that writes tokens is packed for a CPU."""
    if isinstance(run.model, Emitter) and (run.task.emits or precision != "auto"):
        return prepared(run.model, precision)
    return run.model


def examples(run: Run, most: int = 3) -> list[dict[str, Any]]:
    """A few held-out inputs for the page to offer; none where the run kept no such rows."""
    for part in ("test", "valid"):
        if run.folder.file(f"data/{part}").is_dir() and (store := run.store(part)):
            rows = [store.row(i) for i in range(min(most, len(store)))]
            return [{name: begun(value, run) for name, value in run.task.sample(row).items()} for row in rows]
    return []


def begun(value: Any, run: Run) -> Any:
    """A held-out value to try: whole, or the first line of a text that is to be gone on with."""
    return value.strip().split("\n")[0][:40] if run.task.emits and isinstance(value, str) else value


def unique_names(runs: Sequence[Run]) -> list[str]:
    """The name each run is served by.

    Raises:
        UserError: where two runs share one.
    """
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            where = ", ".join(str(run.path) for run in runs if run.name == name)
            raise UserError(
                tr(
                    f"two runs are called '{name}' ({where}); give one another name in its recipe",
                    f"有两个训练都叫 '{name}'（{where}）；请在其中一个的配方里改名",
                )
            )
    return names
