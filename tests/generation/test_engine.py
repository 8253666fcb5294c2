"""The engine against its slow twin, the plain loop; and what happens to the others when one goes wrong or away."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from multihead.codec.text import TextCodec
from multihead.generation.engine import Busy, Draining, Engine, Piece
from multihead.generation.fast import prepared
from multihead.generation.loop import complete
from multihead.generation.sampling import Sampling
from multihead.tasks.language.text_generation import LanguageModel
from multihead.transformer.config import TransformerConfig

TEXTS = [
    "The room was clean and the staff were kind.",
    "房间很干净，服务员也很热情，下次还会再来。",
    "早餐一般，位置不错。\n",
]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.fit(TEXTS * 3, vocab_size=300)


@pytest.fixture(scope="module")
def model(codec: TextCodec) -> LanguageModel:
    torch.manual_seed(0)
    config = TransformerConfig(d_model=32, num_layers=2, num_heads=2, max_length=96)
    return LanguageModel(config, codec.vocab_size).eval()


@pytest.fixture
def engine(model: LanguageModel, codec: TextCodec):
    engine = Engine(model, codec, slots=6, queue=64)
    yield engine
    engine.drain()
    assert engine.active == engine.waiting == 0


class Box:
    """Collects the pieces of one job."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.done = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.reason:
            self.done.set()

    def wait(self) -> Piece:
        assert self.done.wait(60)
        return self.pieces[-1]

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.pieces)


def submit(engine: Engine, prompt, sampling: Sampling, **more):
    box = Box()
    job = engine.job(prompt, sampling, box, **more)
    engine.submit([job])
    return box, job


def wishes(codec: TextCodec, count: int, seeded: bool) -> list[tuple[list[int], Sampling]]:
    rng = random.Random(5)
    found = []
    for i in range(count):
        text = rng.choice(TEXTS)
        prompt = codec.encode(text[: rng.randint(0, len(text))]).tolist()
        sampling = Sampling(
            max_tokens=rng.randint(1, 40),
            temperature=rng.choice([0.5, 1.0, 1.7]) if seeded else 0.0,
            top_k=rng.choice([0, 5, 50]),
            top_p=rng.choice([0.7, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            stop=rng.choice([(), ("e",), ("。", "房间")]),
            seed=i,
        )
        found.append((prompt, sampling))
    return found


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("seeded", [False, True], ids=["greedy", "seeded"])
def test_twenty_at_once_say_what_each_says_alone(model, codec, engine, seeded, fast):
    if fast:
        engine.model = prepared(model, "float32")
    asked = wishes(codec, 20, seeded)
    boxes = []
    for i, (prompt, sampling) in enumerate(asked):
        boxes.append(submit(engine, prompt, sampling)[0])
        if i % 5 == 4:
            time.sleep(0.01)
    for (prompt, sampling), box in zip(asked, boxes, strict=True):
        alone = complete(model, codec, [prompt], sampling)[0]
        last = box.wait()
        assert (box.text, last.tokens, last.reason) == (alone.text, len(alone.ids), alone.reason)
        assert all(p.text for p in box.pieces[:-1])


def test_samples_of_one_prompt_differ_and_repeat(codec, engine):
    prompt = codec.encode("The").tolist()
    sampling = Sampling(max_tokens=20, seed=3)
    texts = [submit(engine, prompt, sampling, sample=i)[0] for i in (0, 1, 0)]
    first, second, again = (box.wait() and box.text for box in texts)
    assert first == again != second


def test_a_prompt_longer_than_the_model_holds_is_refused_and_length_ends_at_its_reach(codec, engine):
    from multihead.errors import UserError

    with pytest.raises(UserError, match="at most 95"):
        engine.job([5] * 96, Sampling(), print)
    box, _ = submit(engine, [5] * 90, Sampling(max_tokens=500, temperature=0))
    assert box.wait().tokens <= 6 and box.wait().reason


def test_logprobs_are_the_models_own(model, codec, engine):
    prompt = codec.encode("The room").tolist()
    box, job = submit(engine, prompt, Sampling(max_tokens=12, seed=1), logprobs=4)
    box.wait()
    tokens = [t for p in box.pieces for t in p.logprobs]
    with torch.inference_mode():
        known = model(torch.tensor([job.row.ids[:-1]]))[0].log_softmax(-1)[len(prompt) - 1 :]
    assert len(tokens) == 12 - (job.row.ids[-1] == codec.eos)
    for token, row in zip(tokens, known, strict=False):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [i for i, _ in token.top] == row.topk(4).indices.tolist()
    assert b"".join(codec.token(t.id) for t in tokens).decode("utf-8", "replace") == box.text


def test_cancelling_frees_the_slot_and_leaves_the_others_alone(model, codec, engine):
    prompt = codec.encode("房间").tolist()
    long = Sampling(max_tokens=90, temperature=0, stop=())
    expected = complete(model, codec, [prompt], long)[0].text
    boxes = [submit(engine, prompt, long) for _ in range(12)]
    for _, job in boxes[::2]:
        job.cancel()
        job.cancel()
    for i, (box, _) in enumerate(boxes):
        reason = box.wait().reason
        assert reason == "cancelled" or i % 2 or box.text == expected
        assert i % 2 == 0 or box.text == expected
    assert sum(box.wait().reason == "cancelled" for box, _ in boxes) >= 3
    stream = engine.stream(prompt, long)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while engine.active and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.active == 0


def test_a_fault_in_one_text_ends_only_that_one(model, codec, monkeypatch):
    poison, start, step = 290, model.start, model.step

    def bad_start(batch):
        if (batch["ids"] == poison).any():
            raise RuntimeError("bad prompt")
        return start(batch)

    def bad_step(ids, cache):
        if any(n >= 42 for n in cache.lengths):
            raise RuntimeError("bad step")
        return step(ids, cache)

    greedy = Sampling(max_tokens=15, temperature=0)
    good = [codec.encode(t[:5]).tolist() for t in TEXTS]
    alone = [complete(model, codec, [p], greedy)[0].text for p in good]
    monkeypatch.setattr(model, "start", bad_start)
    monkeypatch.setattr(model, "step", bad_step)
    engine = Engine(model, codec, slots=8)

    def broken(piece):
        raise OSError("nobody listens")

    engine.submit([engine.job(good[0], greedy, broken)])
    boxes = [submit(engine, p, greedy)[0] for p in (good[0], [poison], [9] * 40, good[1], good[2])]
    reasons = [box.wait().reason for box in boxes]
    assert reasons[1] == reasons[2] == "error"
    assert boxes[2].wait().tokens == 3
    assert [boxes[i].text for i in (0, 3, 4)] == alone
    later, _ = submit(engine, good[1], greedy)
    assert later.wait() and later.text == alone[1]
    assert engine.drain(10)


def test_logits_that_are_no_numbers_end_one_text_only(model, codec, monkeypatch):
    step = model.step

    def bad_step(ids, cache):
        logits = step(ids, cache)
        logits[[i for i, n in enumerate(cache.lengths) if n > 20]] = float("nan")
        return logits

    monkeypatch.setattr(model, "step", bad_step)
    engine = Engine(model, codec, slots=4)
    long, _ = submit(engine, [5] * 18, Sampling(max_tokens=9, temperature=0))
    short, _ = submit(engine, [6] * 4, Sampling(max_tokens=9, temperature=0))
    assert long.wait().reason == "error"
    assert short.wait().reason in ("length", "stop")
    assert engine.drain(10)


def test_a_full_queue_refuses_and_a_draining_engine_ends_what_it_has(model, codec):
    engine = Engine(model, codec, slots=1, queue=2)
    long = Sampling(max_tokens=80, temperature=0)
    boxes = [submit(engine, [7], long)[0] for _ in range(3)]
    with pytest.raises(Busy):
        submit(engine, [7], long)
    done = []
    drain = threading.Thread(target=lambda: done.append(engine.drain(60)))
    drain.start()
    time.sleep(0.01)
    with pytest.raises(Draining):
        submit(engine, [7], long)
    drain.join()
    assert done == [True]
    assert [box.wait().reason for box in boxes] == [boxes[0].wait().reason] * 3 != ["cancelled"] * 3


def test_a_drain_without_time_cuts_off(model, codec):
    engine = Engine(model, codec, slots=1)
    boxes = [submit(engine, [7], Sampling(max_tokens=90, temperature=0))[0] for _ in range(4)]
    assert engine.drain(0) is False
    assert boxes[-1].wait().reason == "cancelled"
    assert all(box.done.is_set() for box in boxes)
