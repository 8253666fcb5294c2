"""A served model at work: its rows checked, its engine or batcher, its card."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from multihead.data.rows import Column
from multihead.errors import UserError, nearest, tr
from multihead.generation.engine import Busy, Draining, Engine, Job, Piece
from multihead.generation.loop import Emitter
from multihead.generation.sampling import Sampling
from multihead.serve.batcher import Batcher
from multihead.serve.metrics import Metrics
from multihead.serve.problems import ApiError, of_user_error
from multihead.serve.settings import ServeSettings
from multihead.task import Answer, Task

SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed")


@dataclass
class Served:
    """A model to serve.

    Args:
        name: what callers write as ``model``.
        task: with its codecs loaded.
        model: in evaluation mode.
        settings: limits of this model alone; None for the server's.
        examples: a few inputs that the page offers to try.
    """

    name: str
    task: Task
    model: nn.Module
    settings: ServeSettings | None = None
    examples: Sequence[Any] = ()


@dataclass
class Hosted:
    """A `Served` with its thread. Texts of models that go on with a text come from an `Engine`; all else, from a
    `Batcher`."""

    served: Served
    settings: ServeSettings
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        served = self.served
        self.name, self.task = served.name, served.task
        self.engine: Engine | None = None
        self.batcher: Batcher | None = None
        self._closed = True
        served.model.eval()
        self.start()

    def start(self) -> None:
        """Ready for work, also after a ``drain``."""
        if not self._closed:
            return
        self._closed = False
        served, limits = self.served, self.settings
        seen = self.metrics.batch.labels(served.name).observe
        if isinstance(served.model, Emitter) and self.task.emits and hasattr(self.task, "prompt"):
            codec = self.task.codec  # type: ignore[attr-defined]
            self.engine = Engine(served.model, codec, limits.slots, limits.queue, served.name, seen)
            engine = self.engine
            self.metrics.watch(self.name, lambda: engine.waiting, lambda: engine.active, limits.slots)
        else:
            self.batcher = Batcher(
                self.task, served.model, limits.max_batch, limits.wait_ms, limits.queue, served.name, seen
            )
            batcher = self.batcher
            self.metrics.watch(self.name, lambda: batcher.waiting, None, 0)

    @property
    def asks(self) -> tuple[str, ...]:
        """The options a caller may send beside the input."""
        return SAMPLING if self.engine is not None else tuple(getattr(self.task, "asks", ()))

    @property
    def embeds(self) -> bool:
        """Whether it gives vectors."""
        return self.task.embeds and self.batcher is not None

    def card(self) -> dict[str, Any]:
        """The model as ``/v1/models`` shows it: the fields of the OpenAI API, and what the page needs to know."""
        title = self.task.title
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "multihead",
            "kind": "generation" if self.engine is not None else "prediction",
            "field": self.task.field,
            "title": {"en": title[0], "zh": title[1]},
            "inputs": [{"name": c.name, "kind": c.kind, "required": c.required} for c in self.task.inputs()],
            "options": list(self.asks),
            "embeds": self.embeds,
            "draws": self.task.draws,
            "speaks": self.task.speaks,
            "voices": list(self.task.voices),
            "retrieves": self.task.retrieves,
            "ranks": self.task.ranks,
            "context": [{"name": c.name, "kind": c.kind} for c in self.task.context()],
            "max_tokens": min(self.settings.max_tokens, self.engine.model.max_length - 1) if self.engine else None,
            "examples": list(self.served.examples),
        }

    # -- rows ---------------------------------------------------------------------------------------------------------

    def rows(self, items: Sequence[Any]) -> list[dict[str, Any]]:
        """HTTP inputs → rows, through ``task.request``; every fault of every row at once.

        Raises:
            ApiError: 422, naming the fields.
        """
        rows, faults = [], []
        for i, item in enumerate(items):
            try:
                row = self.task.request(item)
                found = self._faults(row, item)
            except UserError as error:
                found = [("", str(p)) for p in error.problems]
            except (TypeError, ValueError, KeyError, AttributeError, IndexError):
                shown = ", ".join(c.name for c in self.task.inputs())
                found = [("", tr(f"a row is a text or an object with: {shown}",
                                  f"一行应是文本，或含有 {shown} 的对象"))]
            if found:
                faults += [(f"input[{i}]" + (f".{name}" if name else ""), text) for name, text in found]
            else:
                rows.append(row)
        if faults:
            listed = [f"{where}: {text}" for where, text in faults[:20]]
            if len(faults) > len(listed):
                listed.append(tr(f"and {len(faults) - 20} more", f"另有 {len(faults) - 20} 处"))
            raise ApiError(422, "; ".join(listed), faults[0][0], "invalid_row")
        return rows

    def _faults(self, row: Any, item: Any) -> list[tuple[str, str]]:
        if not isinstance(row, dict):
            raise TypeError
        inputs = [c.name for c in self.task.inputs()]
        found = []
        for name in row:
            # What the task's own `request` made of the body is the task's matter.
            if isinstance(item, dict) and name in item and name not in inputs:
                hint = nearest(str(name), inputs)
                shown = ", ".join(inputs)
                found.append((str(name), tr(f"not a field of this model{hint}; it reads: {shown}",
                                             f"这个模型没有这个字段{hint}；它读取：{shown}")))
        for column in self.task.inputs():
            if column.name not in row:
                if column.required:
                    found.append((column.name, tr("is missing", "缺少这个字段")))
            elif fault := value_fault(column, row[column.name], blank=self.engine is not None):
                found.append((column.name, fault))
        return found

    # -- answers ------------------------------------------------------------------------------------------------------

    async def predict(self, items: Sequence[Any], ask: dict[str, Any]) -> list[Any]:
        """One answer a row, as ``task.response`` shows it.

        Raises:
            ApiError: rows or options that cannot be; no room.
        """
        rows = self.rows(items)
        if self.engine is not None:
            answers = await self._continue(rows, ask)
        else:
            assert self.batcher is not None
            try:
                answers = await self.batcher.answer(rows, ask)
            except (Busy, Draining) as error:
                raise no_room(error) from None
            except UserError as error:
                raise of_user_error(error, param=error.problems[0].where or "input", code="invalid_row") from None
        return [self.task.response(answer) for answer in answers]

    async def embed(self, inputs: Sequence[str | list[int]]) -> tuple[list[np.ndarray], int]:
        """The vector of each text (or token ids), (D,) float32, and how many tokens were read.

        Raises:
            ApiError: too many inputs, or too long; one that is empty or cannot be read; no room.
        """
        assert self.batcher is not None
        if len(inputs) > (most := self.settings.max_rows):
            raise ApiError(422, tr(f"{len(inputs)} inputs are more than the {most} this model takes",
                                   f"{len(inputs)} 条输入超过这个模型的上限 {most}"), "input", "too_many_rows")
        several = len(inputs) > 1
        examples = await asyncio.to_thread(
            lambda: [self._read(one, f"input[{i}]" if several else "input") for i, one in enumerate(inputs)]
        )
        lengths = np.array([len(example["ids"]) for example in examples])
        # Longest first, so that those joined into a batch are of like length.
        order = np.argsort(-lengths, kind="stable")
        try:
            found = await self.batcher.embed([examples[i] for i in order])
        except (Busy, Draining) as error:
            raise no_room(error) from None
        vectors = [vector for _, vector in sorted(zip(order.tolist(), found, strict=True), key=lambda pair: pair[0])]
        self.metrics.tokens.labels(self.name, "prompt").inc(int(lengths.sum()))
        return vectors, int(lengths.sum())

    def _read(self, given: str | list[int], param: str) -> dict[str, np.ndarray]:
        """A text or token ids as the model reads them."""
        if isinstance(given, str):
            column = self.task.inputs()[0]
            if fault := value_fault(column, given):
                raise ApiError(422, f"{param}: {fault}", param, "invalid_row")
            try:
                example = self.task.encode({column.name: given})
            except UserError as error:
                raise of_user_error(error, param=param, code="invalid_row") from None
        else:
            self._known(given, self.task.codec.vocab_size, param)  # type: ignore[attr-defined]
            example = {"ids": np.array(given, dtype=np.int32)}
        if len(example["ids"]) > (most := self.settings.max_prompt_tokens):
            raise ApiError(413, tr(f"the text has {len(example['ids'])} tokens; this server reads at most {most}",
                                   f"文本有 {len(example['ids'])} 个词元；本服务至多读 {most} 个"),
                           param, "context_length_exceeded")  # fmt: skip
        return example

    async def _continue(self, rows: Sequence[dict[str, Any]], ask: dict[str, Any]) -> list[Answer]:
        ask.setdefault("max_tokens", min(Sampling().max_tokens, self.settings.max_tokens))
        sampling = self.sampling(ask)
        prompts = await asyncio.to_thread(lambda: [self.prompt(row, f"input[{i}]") for i, row in enumerate(rows)])
        texts = Texts(self, prompts, sampling)
        return [
            {"text": text, "tokens": tokens, "finish_reason": reason}
            for text, tokens, reason, _ in await texts.whole()
        ]

    def sampling(self, ask: dict[str, Any]) -> Sampling:
        """The wishes as `Sampling`.

        Raises:
            ApiError: 422, naming the field.
        """
        most = self.settings.max_tokens
        asked = ask.get("max_tokens")
        if isinstance(asked, int) and asked > most:
            raise ApiError(
                422,
                tr(f"max_tokens is {asked}; this server gives at most {most}",
                    f"max_tokens 是 {asked}；本服务至多给出 {most}"),
                "max_tokens",
                "max_tokens_too_large",
            )
        try:
            return Sampling.of(ask)
        except UserError as error:
            named = next((name for name in SAMPLING if error.problems[0].message.startswith(name)), None)
            raise of_user_error(error, param=named, code="invalid_value") from None

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages → the ids of a prompt, by the task: its chat template, if there is one.

        Raises:
            ApiError: 413 where it is too long; 422 where the template does not take it.
        """
        try:
            given = self.task.prompt(messages)  # type: ignore[attr-defined]
        except UserError as error:
            raise of_user_error(error, param="messages") from None
        return self.prompt(given, "messages")

    def prompt(self, row: Any, param: str = "prompt") -> list[int]:
        """A row, a text or token ids → the ids of a prompt.

        Raises:
            ApiError: 413 where it is too long; 422 where it cannot be read.
        """
        assert self.engine is not None
        if isinstance(row, list):
            self._known(row, self.engine.codec.vocab_size, param)
            ids = list(row)
        else:
            try:
                encoded = self.task.encode(self.task.request(row) if isinstance(row, str) else row)
            except UserError as error:
                raise of_user_error(error, param=param) from None
            ids = encoded["ids"].tolist()
        most = min(self.settings.max_prompt_tokens, self.engine.model.max_length - 1)
        if len(ids) > most:
            raise ApiError(
                413,
                tr(f"the prompt has {len(ids)} tokens; this server reads at most {most}",
                    f"提示有 {len(ids)} 个词元；本服务至多读 {most} 个"),
                param,
                "context_length_exceeded",
            )
        return ids

    def _known(self, ids: Sequence[int], size: int, param: str) -> None:
        if any(not 0 <= token < size for token in ids):
            message = tr(f"a token id lies outside 0 to {size - 1}", f"词元编号超出 0 到 {size - 1}")
            raise ApiError(422, message, param, "invalid_value")

    def drain(self, seconds: float) -> bool:
        """See ``Engine.drain``; blocks."""
        worker = self.engine or self.batcher
        self._closed = True
        return worker is None or worker.drain(seconds)


def value_fault(column: Column, value: Any, blank: bool = False) -> str:
    """What is wrong with a value for a column; empty where nothing is. `blank`: an empty text will do."""
    kind = column.kind
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "text":
        if not isinstance(value, str):
            return tr("must be a text", "应是文本")
        return "" if blank or value.strip() else tr("is empty", "内容为空")
    if kind == "number":
        return "" if number and math.isfinite(value) else tr("must be a number", "应是数字")
    if kind == "ids":
        parts = value if isinstance(value, list) else [value]
        good = all(isinstance(v, (str, int)) and not isinstance(v, bool) for v in parts)
        return "" if good else tr("must be a list of ids", "应是编号的列表")
    if kind == "labels":
        good = isinstance(value, list) and all(isinstance(v, str) for v in value)
        return "" if good else tr("must be a list of texts", "应是文本的列表")
    if kind == "any":
        return tr("must not be an object", "不能是对象") if isinstance(value, dict) else ""
    return "" if isinstance(value, str) or (number and isinstance(value, int)) else tr("must be a text", "应是文本")


def no_room(error: Exception) -> ApiError:
    """Busy or draining, as an answer that says when to come back."""
    if isinstance(error, Draining):
        return ApiError(503, tr("the server is stopping", "服务正在停止"), code="draining")
    return ApiError(503, tr("the server is busy; try again shortly", "服务繁忙，请稍后再试"), code="overloaded")


class Texts:
    """The answers to one request, `n` to each prompt, all of them under way at once.

    Iterating gives (index, piece); index = prompt · n + sample. ``cancel`` in every case when done.
    """

    def __init__(
        self, hosted: Hosted, prompts: Sequence[list[int]], sampling: Sampling, n: int = 1, logprobs: int | None = None
    ) -> None:
        assert hosted.engine is not None
        self.hosted, self.prompts, self.logprobs = hosted, prompts, logprobs
        self.count = len(prompts) * n
        self.queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.used = 0
        self.since = time.perf_counter()
        engine, loop = hosted.engine, asyncio.get_running_loop()

        def receiver(index: int) -> Callable[[Piece], None]:
            return lambda piece: self._put(loop, index, piece)

        self.jobs: list[Job] = [
            engine.job(prompt, sampling, receiver(p * n + i), i, logprobs)
            for p, prompt in enumerate(prompts)
            for i in range(n)
        ]

    def _put(self, loop: asyncio.AbstractEventLoop, index: int, piece: Piece) -> None:
        loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))

    def submit(self) -> None:
        """Queue the jobs, all or none.

        Raises:
            ApiError: 503.
        """
        assert self.hosted.engine is not None
        try:
            self.hosted.engine.submit(self.jobs)
        except (Busy, Draining) as error:
            raise no_room(error) from None
        read = sum(len(prompt) for prompt in self.prompts)
        self.hosted.metrics.tokens.labels(self.hosted.name, "prompt").inc(read)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        open_jobs, first = self.count, True
        while open_jobs:
            index, piece = await self.queue.get()
            if first:
                self.hosted.metrics.first.labels(self.hosted.name).observe(time.perf_counter() - self.since)
                first = False
            if piece.reason:
                open_jobs -= 1
                self.used += piece.tokens
                self.hosted.metrics.tokens.labels(self.hosted.name, "generated").inc(piece.tokens)
            yield index, piece

    def cancel(self) -> None:
        """Free the slots of what is still under way."""
        for job in self.jobs:
            if not job.ended:
                job.cancel()

    async def whole(self) -> list[tuple[str, int, str, list[Any]]]:
        """Submit, and wait for every answer: (text, tokens, reason, log-probabilities). Cancels when cancelled.

        Raises:
            ApiError: 503 or 500 where an answer did not come to its own end.
        """
        texts: list[list[str]] = [[] for _ in range(self.count)]
        known: list[list[Any]] = [[] for _ in range(self.count)]
        ends: list[tuple[int, str]] = [(0, "")] * self.count
        self.submit()
        try:
            async for index, piece in self:
                texts[index].append(piece.text)
                known[index] += piece.logprobs
                if piece.reason:
                    ends[index] = piece.tokens, piece.reason
                    broken(piece.reason)
        finally:
            self.cancel()
        return [("".join(t), *end, k) for t, end, k in zip(texts, ends, known, strict=True)]

    @property
    def read(self) -> int:
        """Prompt tokens, each prompt once."""
        return sum(len(prompt) for prompt in self.prompts)


def broken(reason: str) -> None:
    """Raise where an answer did not come to its own end."""
    if reason == "error":
        raise ApiError(500, tr("the model failed on this text", "模型处理这段文本时出错"), code="model_error")
    if reason == "cancelled":
        raise no_room(Draining())
