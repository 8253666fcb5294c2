"""Every task in ``tasks/`` keeps the contract; a new file there is tested without being listed here."""

from __future__ import annotations

from multihead import task
from tests.contract import Contract

for _name in task.names():
    _class = "Test" + "".join(part.title() for part in _name.split("-"))
    globals()[_class] = type(_class, (Contract,), {"name": _name})


def test_every_task_is_walked() -> None:
    assert len(task.names()) >= 2
    assert all(task.find(name).field == folder for name, (folder, _) in task.names().items())
