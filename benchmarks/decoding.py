"""Tokens a second of greedy decoding with weights of 8 bits, side by side with llama.cpp on the same Q8_0 file.

A decoder of 110 million random weights (768 wide, 12 layers, 32000 tokens); prompts of 32 tokens, 128 new ones, one
stream and sixteen. Sides take turns in one process, with as many threads each; the figure is the median of the ratios
of neighbouring runs. The share of the bandwidth is the weights' bytes times tokens a second, over the bytes a second
that the sum of 256 MB reads in the same rounds.

    llama.cpp   llama-cpp-python, Q8_0, the file that `multihead.export_gguf` writes
    int8        `prepared(model, "int8")`: the same numbers
    half        `prepared(model, "half")`

Random weights have near ties, so that texts part ways at some token however exact the products are. So int8's own text
is given to float32, which says at how many of its tokens it would have gone on alike.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _common import Aim, arguments, finish
from generate import NEW, PROMPT, SIZES, prompts

from multihead.generation.fast import prepared
from multihead.tasks.language.text_generation import LanguageModel
from multihead.transformer.config import TransformerConfig

SIZE = "110M"
STREAMS = 16
Side = Callable[[], Any]


def model() -> LanguageModel:
    """Random weights, tied, of the shape that `generate.py` compares with transformers."""
    shape = SIZES[SIZE]
    torch.manual_seed(0)
    config = TransformerConfig(
        d_model=shape["hidden_size"], num_layers=shape["num_hidden_layers"], num_heads=shape["num_attention_heads"],
        d_ff=shape["intermediate_size"], max_length=1024,
    )
    return LanguageModel(config, shape["vocab_size"]).eval()


def llama_cpp(file: Path, threads: int) -> Any:
    """The file opened by llama.cpp; exits where llama-cpp-python is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise SystemExit("the peer is not installed: pip install llama-cpp-python (compiles for minutes)") from None
    return llama_cpp.Llama(str(file), n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)


def theirs(peer: Any, ids: list[int]) -> Side:
    """One stream by llama.cpp's own calls, without the sampling of its Python package: always the likeliest token."""
    import llama_cpp

    vocab = SIZES[SIZE]["vocab_size"]

    def run() -> list[int]:
        peer.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(peer.ctx), True)
        found: list[int] = []
        peer.eval(ids)
        for _ in range(NEW):
            logits = llama_cpp.llama_get_logits_ith(peer.ctx, -1)
            values = torch.frombuffer((ctypes.c_float * vocab).from_address(ctypes.addressof(logits.contents)),
                                      dtype=torch.float32)  # fmt: skip
            found.append(int(values.numpy().argmax()))
            if len(found) < NEW:
                peer.eval(found[-1:])
        return found

    return run


def ours(packed: LanguageModel, ids: torch.Tensor) -> Side:
    return lambda: packed.generate(ids, max_length=PROMPT + NEW, temperature=0)[:, PROMPT:].tolist()


def bandwidth(bytes_: int = 1 << 28) -> Side:
    numbers = torch.ones(bytes_ // 4)
    return lambda: numbers.sum()


def main() -> int:
    args = arguments(__doc__, minutes=5, extra=[("--threads", {"type": int, "default": 0})])
    threads = args.threads or (1 if args.cpu else torch.get_num_threads())
    torch.set_num_threads(threads)
    plain = model()
    one, many = prompts(SIZE, 1), prompts(SIZE, STREAMS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        written(plain, file)
        peer = llama_cpp(file, threads)
    int8, half = prepared(plain, "int8"), prepared(plain, "half", rows=1)
    read = bandwidth()
    sides: dict[str, Side] = {
        "read": lambda: [read() for _ in range(8)], "llama.cpp": theirs(peer, one[0].tolist()), "int8": ours(int8, one),
        "half": ours(half, one), f"int8 {STREAMS}": ours(int8, many),
    }
    answers = {name: side() for name, side in sides.items()}  # builds what is built once; clocks settle
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    end, rounds = time.monotonic() + args.minutes * 60, 0
    while rounds == 0 or time.monotonic() < end:
        for name in list(sides) if rounds % 2 == 0 else list(sides)[::-1]:
            begin = args.clock()
            sides[name]()
            seconds[name].append(args.clock() - begin)
        rounds += 1
    return finish(args, aims(seconds, plain, int8, answers, one, threads), {
        "seconds": seconds, "threads": threads, "rounds": rounds, "shape": SIZES[SIZE], "prompt": PROMPT, "new": NEW})


def aims(
    seconds: dict[str, list[float]], plain: LanguageModel, int8: LanguageModel, answers: dict[str, Any],
    one: torch.Tensor, threads: int,
) -> list[Aim]:
    speed = {name: NEW / statistics.median(times) for name, times in seconds.items()}
    speed[f"int8 {STREAMS}"] *= STREAMS

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    limit = 8 * (1 << 28) / statistics.median(seconds["read"])
    weights = sum(p.numel() for p in plain.trunk.parameters()) + plain.head.linear.weight.numel()
    share = {name: speed[name] * weights * size / limit
             for name, size in (("llama.cpp", 34 / 32), ("int8", 34 / 32), ("half", 2))}  # fmt: skip
    print(f"\nreading: {limit / 1e9:.1f} GB/s with {threads} threads; share of it: "
          + ", ".join(f"{name} {value:.0%}" for name, value in share.items()))
    times, half, wide = (ratio("llama.cpp", "int8"), ratio("half", "int8"),
                         STREAMS * ratio("int8", f"int8 {STREAMS}"))  # fmt: skip
    same = agreement(plain, int8, one[0].tolist(), answers["int8"][0])
    pairs = zip(answers["llama.cpp"], answers["int8"][0], strict=True)
    begun = next((i for i, (a, b) in enumerate(pairs) if a != b), NEW)
    print(f"llama.cpp's greedy text and int8's part at token {begun} of {NEW}")
    return [
        Aim("one stream", speed["llama.cpp"], speed["int8"], "tokens/s", f"≥ 0.7 ×: {times:.2f} ×", times >= 0.7),
        Aim("share of the reading bandwidth", share["llama.cpp"], share["int8"], "", "none", True),
        Aim("one stream against half", speed["half"], speed["int8"], "tokens/s", f"≥ 1 ×: {half:.2f} ×", half >= 1.0),
        Aim(f"{STREAMS} streams against one", speed["int8"], speed[f"int8 {STREAMS}"], "tokens/s",
            f"≥ 4 ×: {wide:.2f} ×", wide >= 4),
        Aim("tokens that are float32's likeliest", None, same, "", "≥ 0.9", same >= 0.9),
    ]  # fmt: skip


@torch.inference_mode()
def agreement(plain: LanguageModel, int8: LanguageModel, prompt: list[int], wrote: list[int]) -> float:
    """The share of int8's tokens that are float32's likeliest after the same beginning."""
    ids = torch.tensor([prompt + wrote])
    likeliest = plain(ids[:, :-1])[0, len(prompt) - 1 :].argmax(1)
    return float((likeliest == ids[0, len(prompt) :]).float().mean())


def written(plain: LanguageModel, file: Path) -> None:
    """The model as GGUF, with a vocabulary of numbers: a file needs one."""
    import gguf

    from multihead.export_gguf import FORMS, write_file

    size = plain.head.linear.out_features
    vocabulary = {
        "tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2", "token_list": [f"t{i}" for i in range(size)],
        "token_types": [int(gguf.TokenType.NORMAL)] * size, "token_merges": ["t 0"], "bos_token_id": 0,
        "eos_token_id": 0, "add_bos_token": False,
    }  # fmt: skip
    write_file(file, FORMS["gguf"], plain.config, plain.state_dict(), tied=True, vocabulary=vocabulary, name="random")


if __name__ == "__main__":
    raise SystemExit(main())
