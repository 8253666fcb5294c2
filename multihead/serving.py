"""Step 5, serve: trained runs behind one server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from multihead.build import Run, open_run
from multihead.errors import UserError, tr


def serve_runs(
    paths: Sequence[str | Path],
    host: str | None = None,
    port: int | None = None,
    api_keys: Sequence[str] = (),
    device: str = "auto",
) -> None:
    """Serve the runs at `paths` until SIGTERM or SIGINT. The first run's ``serve:`` section holds for all.

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
    served = [Served(name=name, task=r.task, model=r.model) for name, r in zip(names, runs, strict=True)]
    run(create_app(served, settings), settings.host, settings.port)


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
