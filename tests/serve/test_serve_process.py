"""A server as a process: who leaves frees his slot; SIGTERM lets those under way end; a taken port is said."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import struct
import sys
import threading
import time

import httpx
import pytest
from serve_process import Process, until

from multihead.errors import UserError
from multihead.serve.app import listen

LONG = {"model": "writer", "prompt": "房间", "max_tokens": 1000, "temperature": 1.0, "stream": True}


def figure(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))


def request(path: str, body: dict) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


async def come_and_go(port: int, rng: random.Random) -> None:
    """Connect, ask, and leave at some moment: in the head, in the body, unread, or in mid-stream; politely or not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    way = rng.randrange(6)
    path, body = rng.choice([
        ("/v1/completions", LONG),
        ("/v1/chat/completions", {k: v for k, v in LONG.items() if k != "prompt"}
         | {"messages": [{"role": "user", "content": "a"}], "n": 2}),
        ("/v1/completions", LONG | {"stream": False}),
        ("/v1/predict", {"model": "writer", "input": ["a", "b"], "max_tokens": 1000}),
    ])
    raw = request(path, body)
    if way == 0:
        raw = raw[: rng.randrange(len(raw))]
    writer.write(raw)
    await writer.drain()
    if way >= 2:
        for _ in range(way):
            try:
                await asyncio.wait_for(reader.read(rng.choice([1, 400])), rng.uniform(0, 0.1))
            except TimeoutError:
                break
    if way % 2:
        # No farewell: the kernel sends a reset.
        found = writer.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


def test_five_hundred_come_and_go_in_mid_stream(process):
    rng = random.Random(11)

    async def all_of_them() -> None:
        for _ in range(20):
            await asyncio.gather(*(come_and_go(process.port, rng) for _ in range(25)))

    asyncio.run(all_of_them())
    names = ("multihead_slots_in_use", "multihead_queue", "multihead_requests_under_way")
    # The request that asks is itself under way.
    until(lambda: [figure(process.address, name) for name in names] == [0, 0, 1])
    assert figure(process.address, "multihead_requests_total") > 300
    answer = httpx.post(f"{process.address}/v1/completions", json=LONG | {"stream": False, "max_tokens": 5}, timeout=30)
    assert answer.json()["usage"]["completion_tokens"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
@pytest.mark.parametrize(
    ("signals", "seconds", "whole"),
    [([signal.SIGTERM], 30, True), ([signal.SIGTERM], 0.2, False), ([signal.SIGINT, signal.SIGINT], 300, False)],
    ids=["in-time", "cut-off", "twice"],
)
def test_a_signal_lets_those_under_way_end(tmp_path, signals, seconds, whole):
    server = Process(tmp_path, drain_seconds=seconds)
    lines: list[str] = []
    begun = threading.Event()
    # Many long texts, so that there is something to cut off.
    size = {"max_tokens": 300} if whole else {"max_tokens": 1000, "n": 32}
    bodies = [LONG | size | {"seed": i} for i in range(2)]

    def stream(body: dict, heard: list[str]) -> None:
        with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                heard.append(line)
                if heard is lines:
                    begun.set()

    threads = [threading.Thread(target=stream, args=(body, lines if i == 0 else [])) for i, body in enumerate(bodies)]
    with httpx.Client(base_url=server.address) as other:
        assert other.get("/readyz").status_code == 200
        for thread in threads:
            thread.start()
        assert begun.wait(30)
        for one in signals:
            server.process.send_signal(one)
            time.sleep(0.1)
        if whole:
            until(lambda: other.get("/readyz").status_code == 503)
            refused = other.post("/v1/completions", json=LONG)
            assert refused.status_code == 503 and refused.headers["retry-after"] and "stopping" in refused.text
            assert other.get("/livez").status_code == 200
    since = time.monotonic()
    said = server.process.communicate(timeout=60)[1]
    for thread in threads:
        thread.join(30)
    assert (server.process.returncode, said) == (0, "")
    assert server.returned.read_text() == "returned"
    last = [line for line in lines if line][-1]
    if whole:
        assert last == "data: [DONE]"
    else:
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        assert time.monotonic() - since < 30


def test_a_taken_port_is_said_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:\d+: .*serve\.port"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot listen"):
        listen("203.0.113.7", 0)


def test_an_answer_is_not_held_back_for_company():
    """asyncio turns off Nagle's delay of 40 ms for sockets that say they are TCP, and for no others."""
    from multihead.serve.app import listen

    with listen("127.0.0.1", 0) as found:
        assert found.proto == socket.IPPROTO_TCP
