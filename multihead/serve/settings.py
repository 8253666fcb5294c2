"""The recipe's ``serve:`` section. pydantic only, so that a recipe is checked without the server's packages."""

from __future__ import annotations

import os
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from multihead.errors import tr

KEYS_VARIABLE = "MULTIHEAD_API_KEYS"
RATE = re.compile(r"\s*[1-9]\d*\s*(/|per)\s*([1-9]\d*\s*)?(second|minute|hour|day)s?\s*", re.IGNORECASE)


class ServeSettings(BaseModel):
    """Where the server listens and how much one caller may ask of it."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in (set api_keys then)."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes any free port."""
    api_keys: list[str] = []
    """Keys of which a caller must send one (``Authorization: Bearer KEY``); those in the environment variable
    MULTIHEAD_API_KEYS, separated by commas, are added. None at all: everybody may call."""
    allowed_hosts: list[str] = []
    """Host names that requests may be addressed to. Empty: only this machine's own names where `host` is one of them
    (so that a web page cannot reach a private server by DNS rebinding), else any."""
    cors_origins: list[str] = []
    """Web pages of other origins that may call: ``https://example.org``, or ``*`` for all."""
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    """Longest request body; beyond it 413."""
    max_prompt_tokens: int = Field(default=4096, ge=1)
    """Longest prompt; beyond it 413."""
    max_tokens: int = Field(default=1024, ge=1)
    """Most new tokens a caller may ask for; beyond it 422."""
    max_rows: int = Field(default=256, ge=1)
    """Most rows (or prompts times samples) in one request; beyond it 422."""
    max_batch: int = Field(default=32, ge=1)
    """Most rows joined into one batch."""
    wait_ms: float = Field(default=3, ge=0, le=1000)
    """How long the first row of a batch waits for others."""
    slots: int = Field(default=16, ge=1)
    """Texts generated side by side, per model."""
    queue: int = Field(default=256, ge=0)
    """Requests that may wait, per model; beyond it 503 with Retry-After."""
    streams: int = Field(default=16, ge=0)
    """Streams of sound (WebSocket) that may be open, per model; beyond it 503."""
    rate_limit: str | None = None
    """Requests a caller (by key, else by address) may send: ``60/minute``; beyond it 429 with Retry-After."""
    precision: Literal["auto", "float32", "half", "int8"] = "auto"
    """In what numbers a model that writes texts is held on a CPU; auto: 16 bits where they are fast, else float32; int8
    needs the extra [int8]."""
    drain_seconds: float = Field(default=20, ge=0)
    """Time that requests under way get to end after SIGTERM."""

    @field_validator("rate_limit")
    @classmethod
    def _rate(cls, value: str | None) -> str | None:
        if value is not None and not RATE.fullmatch(value):
            raise ValueError(tr(
                "a rate is written '60/minute' (second, minute, hour or day)",
                "速率写作 '60/minute'（second、minute、hour 或 day）",
            ))
        return value

    @field_validator("api_keys")
    @classmethod
    def _keys(cls, value: list[str]) -> list[str]:
        if any(not key.strip() for key in value):
            raise ValueError(tr("an API key is empty", "API 密钥不能为空"))
        return value

    def open_with(self) -> list[str]:
        """Every key that opens the server: the section's and the environment's."""
        more = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
        return [*self.api_keys, *(key for key in more if key)]
