"""From one log to a served list: a retriever and a ranker are trained, and answer together at /v1/recommend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from multihead.train import train

TINY = {"d_model": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
USERS, ITEMS = 12, 15


def learned(folder: Path, name: str, task: str, **options: Any) -> Any:
    """A run of a few steps on the log of `folder`: the road is looked at, not what is learned."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({
        "task": task, "name": name, "data": {"train": str(folder / "log.csv")}, "model": TINY, "options": options,
        "train": {"steps": 3, "batch_size": 8, "threads": 1, "precision": "float32"}}))  # fmt: skip
    return train(path, run=folder / "runs" / name, progress=False)


@pytest.mark.parametrize("retriever", ["two-tower-retrieval", "sequential-recommendation"])
def test_a_retriever_and_a_ranker_answer_together(tmp_path: Path, retriever: str) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from multihead.serve.app import Served, create_app

    pairs = [(u, t) for u in range(USERS) for t in range(9)]
    lines = [f"u{u},i{(u + t * t) % ITEMS},{t},{t % 24},{int((u + t) % 3 == 0)}" for u, t in pairs]
    (tmp_path / "log.csv").write_text("user,item,time,hour,click\n" + "\n".join(lines) + "\n")
    titles = "".join(f"i{i},Film {i},{'drama' if i % 2 else 'comedy'}\n" for i in range(ITEMS))
    (tmp_path / "items.csv").write_text("item,title,genre\n" + titles)
    items = str(tmp_path / "items.csv")
    found = learned(tmp_path, "found", retriever, items=items, remember=True)
    ranked = learned(tmp_path, "ranked", "click-through-rate", items=items)
    served = [Served(run.name, run.task, run.model) for run in (found, ranked)]
    with testclient.TestClient(create_app(served), base_url="http://127.0.0.1") as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["found", "ranked"]
        asked = [{"user": f"u{u}", "context": {"hour": u}} for u in range(USERS)] + [{"user": "stranger"}]
        answer = client.post("/v1/recommend", json={"requests": asked, "k": 5}).json()
        assert (answer["model"], answer["ranker"]) == ("found", "ranked")
        for one, told in zip(asked, answer["lists"], strict=True):
            alone = client.post("/v1/recommend", json={**one, "k": 5}).json()
            assert [i["id"] for i in told["items"]] == [i["id"] for i in alone["items"]] and told["user"] == one["user"]
            rows = [{**one.get("context", {}), "user": one["user"], "item": item["id"]} for item in told["items"]]
            own = [reply["p"] for reply in ranked.predict(rows)]
            assert [item["score"] for item in told["items"]] == pytest.approx(own, abs=1e-4)
            assert own == sorted(own, reverse=True)
            had = set(found.task.known.get(one["user"], {}).get("history", ()))
            assert not had & {item["id"] for item in told["items"]}
            assert all(item["title"] == f"Film {item['id'][1:]}" for item in told["items"])
        assert answer["lists"][-1]["unknown_user"] == "stranger"
        thinned = client.post("/v1/recommend", json={"user": "u3", "k": 5, "diversify": 0.8}).json()["items"]
        assert len({item["id"] for item in thinned}) == len(thinned) > 0
