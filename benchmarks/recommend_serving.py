"""How long ``/v1/recommend`` takes: exact retrieval over 100,000 items of width 64, 50 requests a second, one server.

    python benchmarks/recommend_serving.py [--json FILE] [--minutes N] [--items 100000] [--rate 50] [--seconds 20]

The server is ``multihead serve``'s own application in a process of its own, with a sequential-recommendation of random
weights (100,000 items with titles, 64 wide, 2 layers, histories of up to 50; ``serve: {wait_ms: 0}``): what is measured
is the same whatever the weights are. The load comes from another process, open loop: requests leave at their times,
drawn as a Poisson process, whether or not earlier ones were answered, and a request's time counts from the moment at
which it should have left, so that a server that falls behind cannot hide it (Tene's "coordinated omission"). Every
answer is checked: ten items, none of the history.

Beside it stand the same with MMR (`"diversify": 0.3` out of 200 candidates), the parts of one answer, measured in a
process of their own, and the processor time that the server spends on a request. Load average is printed: on cores
that others use the times of the clock say little, and the processor's is what can be compared.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from _common import Aim, arguments, finish

K, WARM = 10, 40


def retriever(items: int) -> tuple[Any, Any]:
    """A task with a made-up catalogue and a model of random weights."""
    from multihead.codec.items import ItemCodec
    from multihead.tasks.recommendation.sequential_recommendation import SequentialRecommendation
    from multihead.transformer.config import TransformerConfig

    task = SequentialRecommendation()
    names = [f"B{i:07d}" for i in range(items)]
    titles = {name: {"title": f"The item that is called {name}"} for name in names}
    task.codec = ItemCodec(names, np.arange(items, 0, -1), titles)
    torch.manual_seed(0)
    return task, task.model(TransformerConfig(**task.defaults["model"])).eval()


def serve(items: int) -> None:
    """The server's process: prints its address, ends on SIGTERM."""
    from multihead.serve.app import Served, ServeSettings, create_app, run

    torch.set_num_threads(1)
    app = create_app([Served("retriever", *retriever(items))], ServeSettings(wait_ms=0))
    run(app, port=0, started=lambda address: print(address, flush=True))


class Connections:
    """Keep-alive connections to one server: bare HTTP/1.1 over asyncio's streams, since the load shares its machine
    with the server, and an HTTP library takes as much time for a request as the server does."""

    def __init__(self, address: str) -> None:
        self.host, port = address.removeprefix("http://").split(":")
        self.port = int(port)
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> Any:
        """The JSON of an answer with status 200."""
        reader, writer = self.free.pop() if self.free else await asyncio.open_connection(self.host, self.port)
        head = (f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        writer.write(head.encode() + body)
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        length = next(int(field[15:]) for field in fields if field.lower().startswith("content-length:"))
        answer = json.loads(await reader.readexactly(length))
        assert status.split()[1] == "200", answer
        self.free.append((reader, writer))
        return answer


def load(address: str, items: int, rate: float, seconds: float, wish: str) -> None:
    """The load's process: prints each request's milliseconds as JSON."""
    rng = random.Random(0)

    def wanted() -> tuple[list[str], bytes]:
        history = [f"B{rng.randrange(items):07d}" for _ in range(rng.randint(1, 50))]
        return history, json.dumps({"history": history, "k": K, **json.loads(wish)}).encode()

    async def run() -> list[float]:
        server, at, due = Connections(address), 0.0, []
        for _ in range(WARM):
            await server.post("/v1/recommend", wanted()[1])
        while at < seconds:
            due.append((at, *wanted()))
            at += rng.expovariate(rate)
        took, start = [0.0] * len(due), time.perf_counter() + 0.2

        async def one(i: int) -> None:
            moment, history, body = due[i]
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            found = (await server.post("/v1/recommend", body))["items"]
            took[i] = 1000 * (time.perf_counter() - start - moment)
            assert len(found) == K and not {item["id"] for item in found} & set(history)

        await asyncio.gather(*(one(i) for i in range(len(due))))
        return took

    print(json.dumps(asyncio.run(run())))


def measured(address: str, args: Any, wish: dict[str, Any]) -> np.ndarray:
    """Milliseconds of each request of one run."""
    words = [sys.executable, __file__, "--load", address, "--wish", json.dumps(wish)]
    words += ["--items", str(args.items), "--rate", str(args.rate), "--seconds", str(args.seconds)]
    return np.array(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def spent(pid: int) -> float:
    """Processor seconds of a process so far, as Linux counts them; NaN elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def parts(items: int) -> dict[str, float]:
    """Milliseconds of what one answer consists of, the median of 50, in this process and on one thread."""
    torch.set_num_threads(1)
    task, model = retriever(items)
    row = {"history": [f"B{i * 37 % items:07d}" for i in range(50)]}
    example = task.encode(row)

    def median(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(50):
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
        return float(np.median(times))

    with torch.inference_mode():
        batch = task.collate([example])
        scores = task.scores(model, batch)
        return {
            "read the history": median(lambda: task.collate([task.encode(row)])),
            "score all items": median(lambda: task.scores(model, batch)),
            "best ten": median(lambda: scores.topk(K)),
            "whole answer": median(lambda: task.predict(model, task.collate([task.encode(row)]), {"k": K})),
            "200 candidates": median(lambda: task.predict(model, task.collate([task.encode(row)]), {"k": 200})),
        }


def main() -> int:
    extra = [("--items", {"type": int, "default": 100_000}), ("--rate", {"type": float, "default": 50.0}),
             ("--seconds", {"type": float, "default": 20.0, "help": "of each load"}),
             ("--load", {"metavar": "ADDRESS", "help": "be the load"}), ("--wish", {"default": "{}"}),
             ("--serve", {"action": "store_true", "help": "be the server"})]
    args = arguments(__doc__, minutes=2, extra=extra)  # type: ignore[arg-type]
    if args.serve or args.load:
        serve(args.items) if args.serve else load(args.load, args.items, args.rate, args.seconds, args.wish)
        return 0
    print("parts, ms:", {name: round(ms, 2) for name, ms in parts(args.items).items()}, flush=True)
    server = subprocess.Popen([sys.executable, __file__, "--serve", "--items", str(args.items)],
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    aims, found = [], {}
    try:
        for name, wish in (("retrieved", {}), ("retrieved and thinned out", {"diversify": 0.3})):
            before, so_far = os.getloadavg()[0], spent(server.pid)
            ms = measured(address, args, wish)
            p50, p99 = np.quantile(ms, (0.5, 0.99)).tolist()
            processor = 1000 * (spent(server.pid) - so_far) / (len(ms) + WARM)
            found[name] = {"requests": len(ms), "p50": p50, "p99": p99, "max": float(ms.max()), "load": before,
                           "processor_ms": processor}
            print(name, {key: round(value, 2) for key, value in found[name].items()}, flush=True)
            aims.append(Aim(f"{name}, p99 at {args.rate:g} requests a second", None, p99, "ms", "< 20", p99 < 20))
    finally:
        server.terminate()
        server.wait()
    return finish(args, aims, {"loads": found, "items": args.items})


if __name__ == "__main__":
    raise SystemExit(main())
