"""Continuous batching: texts join and leave the running batch at any token (Yu et al. 2022, "Orca", section 3.1).

One thread a model. Every row has its own wishes and its own source of chance, so what a row says does not depend on
who shares the batch, up to the rounding of the logits. It knows of the model only ``start`` and ``step``.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multihead.generation.loop import Decoding, Emitter, Sequel, TextStream, check_length, ends_of, padded
from multihead.generation.sampling import Sampling, sample
from multihead.transformer.cache import Cache

log = logging.getLogger(__name__)
PREFILL_TOKENS = 4096  # prompts read in one go, padding included, so that running texts do not stand still for long


class Busy(Exception):
    """The queue is full; try again later."""


class Draining(Exception):
    """The engine takes no more work: it is coming to its end."""


@dataclass(frozen=True)
class Token:
    """One emitted token, where log-probabilities were asked for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, by the model's own distribution."""
    offset: int
    """Characters of the answer in front of it."""


@dataclass(frozen=True)
class Piece:
    """What one or several tokens added to an answer."""

    text: str
    tokens: int
    """New tokens of this answer so far."""
    reason: str = ""
    """Empty until the last piece: "stop", "length", "cancelled" or "error"."""
    logprobs: tuple[Token, ...] = ()


class Job:
    """One prompt on its way. `receive` is called in the engine's thread with each piece, the last with a reason.

    Args:
        sample: which of several answers to one prompt; each has its own chance under one seed.
        logprobs: None for no `Token`s; else how many of the likeliest go with each.

    Raises:
        UserError: the prompt is too long for the model.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        sampling: Sampling,
        receive: Callable[[Piece], None],
        sample: int = 0,
        logprobs: int | None = None,
    ) -> None:
        begun = list(prompt) or [engine.codec.bos]
        check_length(len(begun), engine.model.max_length)
        self.engine, self.receive, self.logprobs, self.prompt = engine, receive, logprobs, len(begun)
        self.text = TextStream(engine.codec, sampling.stop)
        self.row = Sequel(begun, sampling, sampling.generator(sample), ends_of(engine.codec), self.text)
        self.row.left = min(self.row.left, engine.model.max_length - len(begun))
        self.cancelled = self.ended = False
        self._sent = 0
        self._tokens: list[Token] = []

    def cancel(self) -> None:
        """No more of this: frees the slot at the next token. May be called from any thread, and twice."""
        self.engine.cancel(self)

    def push(self, token: int, logprob: float = 0.0, top: tuple[tuple[int, float], ...] = ()) -> bool:
        """Add a token and send on what it releases; True where the answer has come to its end."""
        place = len(self.text.text) + len(self.text.held)
        ended = self.row.push(token)
        if self.logprobs is not None and token not in self.row.ends:
            self._tokens.append(Token(token, logprob, top, place))
        if ended:
            self.text.flush()
            self.end(self.row.reason)
        elif len(self.text.text) > self._sent:
            self._send("")
        return ended

    def end(self, reason: str) -> None:
        """The last piece, once."""
        if not self.ended:
            self.ended = True
            self._send(reason)

    def _send(self, reason: str) -> None:
        text, self._sent = self.text.text[self._sent :], len(self.text.text)
        whole = bool(reason) and not self.text.stopped
        known = tuple(t for t in self._tokens if whole or t.offset < self._sent)
        self._tokens = self._tokens[len(known) :]
        try:
            self.receive(Piece(text, len(self.row.ids) - self.prompt, reason, known))
        except Exception:
            # Nobody listens any more; that is this job's matter and nobody else's.
            self.cancelled = True


class Engine:
    """Generates many texts side by side.

    Args:
        model: in evaluation mode; has ``start``, ``step`` and ``max_length``.
        codec: with ``stream()``, ``bos`` and ``eos``.
        slots: rows of the running batch.
        queue: jobs that may wait for a slot.
        on_step: called with the number of rows of every step.
    """

    def __init__(
        self,
        model: Emitter,
        codec: Any,
        slots: int = 16,
        queue: int = 256,
        name: str = "engine",
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.codec, self.slots, self.queue = model, codec, slots, queue
        self.name, self.on_step = name, on_step
        self._device = next(model.parameters()).device
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._going: list[Job] = []
        self._arriving: list[Job] = []
        self._state: Cache | None = None
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._going) + len(self._arriving)

    @property
    def waiting(self) -> int:
        """Jobs without a slot."""
        return len(self._waiting)

    def job(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        receive: Callable[[Piece], None],
        sample: int = 0,
        logprobs: int | None = None,
    ) -> Job:
        """A job for ``submit``; see `Job`."""
        return Job(self, prompt, sampling, receive, sample, logprobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take on all of `jobs`, or none.

        Raises:
            Busy: too many are waiting.
            Draining: after ``drain`` was called.
        """
        with self._changed:
            if self._draining:
                raise Draining
            busy = self.active + len(self._waiting)
            if busy and busy + len(jobs) > self.queue + self.slots:
                raise Busy
            self._waiting.extend(jobs)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"multihead-{self.name}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stream(self, prompt: Sequence[int], sampling: Sampling, sample: int = 0) -> Iterator[Piece]:
        """The pieces of one answer as they come; leaving the loop early cancels it."""
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        job = self.job(prompt, sampling, pieces.put, sample)
        self.submit([job])
        try:
            while not (piece := pieces.get()).reason:
                yield piece
            yield piece
        finally:
            job.cancel()

    def cancel(self, job: Job) -> None:
        """See ``Job.cancel``."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.end("cancelled")
            self._changed.notify_all()

    def drain(self, seconds: float = 0.0) -> bool:
        """Take no more jobs, give those there are `seconds` to end, cut off the rest, stop the thread.

        Returns:
            Whether every job came to its own end.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            while (self.active or self._waiting) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            whole = not (self.active or self._waiting)
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        return whole

    # -- in the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        logits_BV: Tensor | None = None
        with Decoding(self.model):
            while self._ready():
                try:
                    logits_BV = self._round(logits_BV)
                except Exception:
                    log.exception("%s: a round of %d texts failed; each goes on alone", self.name, self.active)
                    logits_BV = self._alone(self._take_back())
                if not self._going:
                    self._state = logits_BV = None
                with self._changed:
                    self._changed.notify_all()
        with self._changed:
            for job in [*self._take_back(), *self._waiting]:
                job.end("cancelled")
            self._waiting.clear()

    def _ready(self) -> bool:
        """Wait for work; False when the thread should end."""
        with self._changed:
            while not (self._closed or self._going or self._waiting):
                self._changed.wait()
            return not self._closed

    def _round(self, logits_BV: Tensor | None) -> Tensor | None:
        """One token for every row; then the waiting come in.

        `logits_BV` and what is returned: scores of the next token of the rows in ``_going``, None where there are none.
        """
        if logits_BV is not None:
            chosen = self._choose(logits_BV)
            logits_BV = None
            if chosen and self._state is not None:
                if self.on_step is not None:
                    self.on_step(len(chosen))
                logits_BV = self.model.step(torch.tensor(chosen, device=self._device), self._state)
        self._admit()
        if self._arriving:
            logits_BV = self._read(logits_BV)
        return logits_BV

    def _choose(self, logits_BV: Tensor) -> list[int]:
        """Sample and hand on one token a row; rows that end leave. Returns the tokens of those that stay."""
        chosen = self._sample(logits_BV)
        for i in reversed(range(len(chosen))):
            if self._push(self._going[i], chosen[i], logits_BV[i]):
                self._going[i], chosen[i] = self._going[-1], chosen[-1]
                self._going.pop()
                chosen.pop()
                assert self._state is not None
                self._state.drop(i)
        return chosen

    def _sample(self, logits_BV: Tensor) -> list[int]:
        """The next token of each row; −1 where there can be none."""
        rows = [job.row for job in self._going]
        sound = logits_BV.amax(dim=1).isfinite().tolist()
        try:
            drawn = _drawn(logits_BV, rows)
        except Exception:
            log.exception("%s: sampling failed; each text is sampled alone", self.name)
            drawn = [_drawn_alone(logits_BV[i : i + 1], row) for i, row in enumerate(rows)]
        return [token if fine else -1 for token, fine in zip(drawn, sound, strict=True)]

    def _push(self, job: Job, token: int, logits_V: Tensor) -> bool:
        """True where the job ends with this token."""
        try:
            if job.cancelled or token < 0:
                job.end("cancelled" if job.cancelled else "error")
                return True
            if job.logprobs is None:
                return job.push(token)
            known_V = logits_V.float().log_softmax(0)
            values, ids = known_V.topk(min(job.logprobs, len(known_V)))
            return job.push(token, float(known_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
        except Exception:
            log.exception("%s: one text failed", self.name)
            job.end("error")
            return True

    def _admit(self) -> None:
        """Slots for the jobs that wait, in their order, as many as are read in one go."""
        with self._changed:
            longest = 0
            while self._waiting and self.active < self.slots:
                longest = max(longest, self._waiting[0].prompt)
                if self._arriving and longest * (len(self._arriving) + 1) > PREFILL_TOKENS:
                    break
                self._arriving.append(self._waiting.popleft())

    def _read(self, logits_BV: Tensor | None) -> Tensor | None:
        """The prompts of the arriving jobs, as a batch."""
        arriving = self._arriving
        try:
            state, new_BV = self.model.start(padded([job.row.ids for job in arriving], self._device))
        except Exception:
            log.exception("%s: reading %d prompts failed; each is read alone", self.name, len(arriving))
            self._arriving = []
            return self._alone(arriving, logits_BV)
        logits_BV = self._join(logits_BV, arriving, state, new_BV)
        self._arriving = []
        return logits_BV

    def _join(self, logits_BV: Tensor | None, jobs: list[Job], state: Cache, new_BV: Tensor) -> Tensor:
        if self._state is None or logits_BV is None:
            self._state, logits_BV = state, new_BV
        else:
            self._state.join(state)
            logits_BV = torch.cat((logits_BV, new_BV))
        self._going.extend(jobs)
        return logits_BV

    def _alone(self, jobs: Sequence[Job], logits_BV: Tensor | None = None) -> Tensor | None:
        """Read each job's text so far by itself, the last token by a step: one that fails ends, the others go on."""
        for job in jobs:
            ids, begun = job.row.ids, len(job.row.ids) > job.prompt
            try:
                state, new_BV = self.model.start(padded([ids[:-1] if begun else ids], self._device))
                if begun:
                    new_BV = self.model.step(torch.tensor(ids[-1:], device=self._device), state)
                logits_BV = self._join(logits_BV, [job], state, new_BV)
            except Exception:
                log.exception("%s: one text failed", self.name)
                job.end("error")
        return logits_BV

    def _take_back(self) -> list[Job]:
        jobs = [job for job in [*self._going, *self._arriving] if not job.ended]
        self._going, self._arriving, self._state = [], [], None
        return jobs


def _drawn(logits_BV: Tensor, rows: Sequence[Sequel]) -> list[int]:
    ids, samplings, generators = [r.ids for r in rows], [r.sampling for r in rows], [r.generator for r in rows]
    return sample(logits_BV, ids, samplings, generators).tolist()


def _drawn_alone(logits_1V: Tensor, row: Sequel) -> int:
    try:
        return _drawn(logits_1V, [row])[0]
    except Exception:
        return -1
