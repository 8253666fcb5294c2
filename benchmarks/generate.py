"""Tokens a second of greedy generation, side by side with transformers' ``generate``, from the same weights.

Two models of random weights, of 10 and of 110 million parameters, in transformers' Llama class and in our
`LanguageModel`; prompts of 32 tokens, 128 new ones, one row and sixteen. Each side runs in a process of its own, as its
users have it, with two threads; they take turns, and the figure is the median of the ratios of neighbouring runs.

    float32    our `prepared(model, "float32")` against transformers' float32; the tokens must be identical
    default    our `prepared(model)`, as prediction and serving use it, against transformers' default, which is float32
               for a model that was not saved in another type. On CPUs that multiply bfloat16 fast ours has its weights
               in float16 for up to 8 rows and in bfloat16 for more.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _common import Aim, arguments, finish

SIZES: dict[str, dict[str, int]] = {
    "10M": {
        "vocab_size": 8000, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6,
        "num_attention_heads": 5,
    },
    "110M": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
ROWS = (1, 16)
PROMPT, NEW = 32, 128
AIMS = {("10M", "float32"): 2.0, ("110M", "float32"): 1.6, ("10M", "default"): 3.0, ("110M", "default"): 3.0}


def llama(**shape: Any) -> Any:
    """A Llama of transformers with random weights, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=10000.0,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def language_model(peer: Any) -> Any:
    """Our `LanguageModel` with the weights of a Llama."""
    import torch

    from multihead.tasks.language.text_generation import LanguageModel
    from multihead.transformer.config import TransformerConfig

    shape = peer.config
    config = TransformerConfig(
        d_model=shape.hidden_size, num_layers=shape.num_hidden_layers, num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads, d_ff=shape.intermediate_size, norm_eps=shape.rms_norm_eps,
    )
    model = LanguageModel(config, shape.vocab_size).eval()
    theirs = peer.state_dict()
    table = theirs["model.embed_tokens.weight"]
    weights = {"input.token.weight": table, "head.linear.weight": table}
    weights["trunk.norm.weight"] = theirs["model.norm.weight"]
    for i in range(shape.num_hidden_layers):
        a, b = f"model.layers.{i}.", f"trunk.blocks.{i}."
        weights |= {
            f"{b}attention.qkv.weight": torch.cat([theirs[f"{a}self_attn.{x}_proj.weight"] for x in "qkv"]),
            f"{b}attention.out.weight": theirs[f"{a}self_attn.o_proj.weight"],
            f"{b}attention_norm.weight": theirs[f"{a}input_layernorm.weight"],
            f"{b}feed_forward.up.weight": torch.cat([theirs[f"{a}mlp.{x}_proj.weight"] for x in ("gate", "up")]),
            f"{b}feed_forward.down.weight": theirs[f"{a}mlp.down_proj.weight"],
            f"{b}feed_forward_norm.weight": theirs[f"{a}post_attention_layernorm.weight"],
        }
    model.load_state_dict(weights)
    return model


def prompts(size: str, rows: int) -> Any:
    """The same ids in both processes: (rows, PROMPT)."""
    import torch

    return torch.randint(0, SIZES[size]["vocab_size"], (rows, PROMPT), generator=torch.Generator().manual_seed(rows))


def work(side: str) -> None:
    """One side: reads ``[size, rows, precision]`` lines, answers ``[seconds, new tokens]`` lines."""
    import torch

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    models: dict[tuple[str, str], Any] = {}

    def peers(size: str) -> Any:
        model = llama(**SIZES[size])
        return lambda ids: model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )

    def ours(size: str, precision: str) -> Any:
        from multihead.generation.fast import prepared

        model = prepared(language_model(llama(**SIZES[size])), "auto" if precision == "default" else precision)
        return lambda ids: model.generate(ids, max_length=PROMPT + NEW, temperature=0)

    for line in sys.stdin:
        size, rows, precision = json.loads(line)
        if (size, precision) not in models:
            models[size, precision] = peers(size) if side == "peer" else ours(size, precision)
        ids = prompts(size, rows)
        begin = time.perf_counter()
        out = models[size, precision](ids)
        print(json.dumps([time.perf_counter() - begin, out[:, PROMPT:].tolist()]), flush=True)


class Side:
    """One side's process."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, "--side", name]
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)

    def run(self, size: str, rows: int, precision: str) -> tuple[float, list[list[int]]]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([size, rows, precision]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.process.args} ended")
        seconds, tokens = json.loads(line)
        return seconds, tokens

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(minutes: float) -> dict[str, dict[str, Any]]:
    """Rounds of all cases until the time is over, at least one: per case seconds, ratios and agreement."""
    peer, ours = Side("peer"), Side("ours")
    end = time.monotonic() + minutes * 60
    cases = [(size, rows) for size in SIZES for rows in ROWS]
    found: dict[str, dict[str, Any]] = {
        f"{size} {rows} {precision}": {"peer": [], "ours": [], "ratio": [], "same": 0, "tokens": 0}
        for size, rows in cases for precision in ("float32", "default")
    }
    for size, rows in cases:  # builds the models and lets memory and clocks settle
        peer.run(size, rows, "float32")
        for precision in ("float32", "default"):
            ours.run(size, rows, precision)
    rounds = 0
    while rounds == 0 or time.monotonic() < end:
        for size, rows in cases:
            turns = ["peer", "float32", "default"] if rounds % 2 == 0 else ["default", "float32", "peer"]
            got = {}
            for turn in turns:
                got[turn] = peer.run(size, rows, "float32") if turn == "peer" else ours.run(size, rows, turn)
            for precision in ("float32", "default"):
                case = found[f"{size} {rows} {precision}"]
                case["peer"].append(got["peer"][0])
                case["ours"].append(got[precision][0])
                case["ratio"].append(got["peer"][0] / got[precision][0])
                for expected, row in zip(got["peer"][1], got[precision][1], strict=True):
                    case["same"] += sum(a == b for a, b in zip(expected, row, strict=True))
                    case["tokens"] += len(row)
        rounds += 1
        print(f"round {rounds}, {max(0.0, end - time.monotonic()):.0f} s left", flush=True)
    peer.close()
    ours.close()
    return found


def main() -> int:
    args = arguments(__doc__, minutes=5)
    found = measure(args.minutes)
    aims = []
    for (size, precision), times in AIMS.items():
        for rows in ROWS:
            case = found[f"{size} {rows} {precision}"]
            speed = {side: rows * NEW / statistics.median(case[side]) for side in ("peer", "ours")}
            ratio = statistics.median(case["ratio"])
            case |= {"tokens_per_second": speed, "median_ratio": ratio}
            aims.append(Aim(
                f"{size}, batch {rows}, {precision}", speed["peer"], speed["ours"], "tokens/s",
                f"≥ {times:g} ×: {ratio:.2f} ×", ratio >= times,
            ))
    for size in SIZES:
        cases = [found[f"{size} {rows} float32"] for rows in ROWS]
        same, tokens = (sum(case[key] for case in cases) for key in ("same", "tokens"))
        aims.append(Aim(f"{size}, greedy, float32", tokens, same, "tokens", "all the same", same == tokens))
    for size in SIZES:
        cases = [found[f"{size} {rows} default"] for rows in ROWS]
        share = sum(case["same"] for case in cases) / sum(case["tokens"] for case in cases)
        print(f"{size}: {share:.1%} of the default's tokens are those of float32")
    return finish(args, aims, {"cases": found, "prompt": PROMPT, "new": NEW, "shapes": SIZES})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        work(sys.argv[2])
    else:
        raise SystemExit(main())
