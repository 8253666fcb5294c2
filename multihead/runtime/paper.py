"""Training a decoder on many GPUs, on paper: memory and communication of a step by formula.

    python -m multihead.runtime.paper --gpus 8 64 512

What is counted, for P parameters of which R lie outside the blocks (tables, head), L blocks of P_b each, width D, inner
width F, vocabulary V, n tokens at once on each of N GPUs, and m micro-batches a step:

    shares (FSDP2)   16 P / N            float32: weights, gradients, Adam's two averages
    whole            2·2 P_b + 6 P_b     two blocks in bfloat16, one's gradient in bfloat16 and again in float32
                     + 8 R               tables and head in float32, and their gradient
                     + 4 P               where gradients of a whole model are kept between micro-batches
    activations      2n (10 D + 4 F) L   bfloat16 kept inside every block; with recompute 2n (D L + 10 D + 4 F)
    logits           10 n V              bfloat16, float32, and their gradient
    copies (DDP)     16 P                in place of the first two, and the same activations and logits

    sent by a GPU, each step, times (N − 1) / N, which a ring takes (Patarasuk & Yuan 2009):
    FSDP2            m (4 P_b L + 4 R) + (m or 1)(4 P_b L + 4 R)
    DDP              8 P                 an all-reduce is a reduce-scatter and an all-gather
    operations       6 P + 12 L D T/2    a token (Kaplan et al. 2020, section 2.1; causal attention over T positions);
                                         recompute adds a third

Each block's bfloat16 weights are gathered twice (2 + 2 bytes) and its float32 gradients scattered once, or once a
micro-batch where gradients of a whole model do not fit between them (`parallel.HELD`). Nothing here is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ..transformer.config import TransformerConfig
from .parallel import HELD

DECODERS = {
    "1B": (TransformerConfig(d_model=2048, num_layers=20, num_heads=16, d_ff=5632, max_length=4096), 32768, True),
    "7B": (TransformerConfig(d_model=4096, num_layers=32, num_heads=32, d_ff=11008, max_length=4096), 32000, False),
}
"""Shape, vocabulary, and whether the head is the table of tokens; the second is Llama 2's (Touvron et al. 2023)."""


def parameters(config: TransformerConfig, vocabulary: int, tied: bool) -> tuple[int, int]:
    """Parameters of one block, and of all that lies outside the blocks, of a decoder with RMSNorm, SwiGLU, rotary
    positions and no biases."""
    D, E, F = config.d_model, config.head_size, config.ff_size
    block = D * E * (2 * config.num_heads + 2 * config.kv_heads) + 3 * D * F + 2 * D
    return block, vocabulary * D * (1 if tied else 2) + D


@dataclass(frozen=True)
class Paper:
    """One row: bytes on each GPU, bytes that each sends in a step, and seconds of both at given rates."""

    state: float
    whole: float
    activations: float
    logits: float
    sent: float
    operations: float

    @property
    def memory(self) -> float:
        return self.state + self.whole + self.activations + self.logits


def paper(
    config: TransformerConfig, vocabulary: int, tied: bool, gpus: int, tokens: int, at_once: int, memory: float,
    copies: bool = False, recompute: bool = False,
) -> Paper:
    """A step of `tokens` tokens on `gpus` GPUs of `memory` bytes, each working on `at_once` tokens at a time.

    Args:
        copies: a whole model on each (DDP) instead of shares of one (FSDP2).
    """
    block, rest = parameters(config, vocabulary, tied)
    D, F, L, n = config.d_model, config.ff_size, config.num_layers, at_once
    P, micro = L * block + rest, max(1, round(tokens / (gpus * at_once)))
    inside = 2 * n * (10 * D + 4 * F)
    ring = (gpus - 1) / gpus
    reduced = micro if HELD * memory < 4 * P else 1
    held = 4.0 * P if micro > 1 and reduced == 1 and not copies else 0.0
    sent = 8.0 * P if copies else micro * (4 * block * L + 4 * rest) + reduced * (4 * block * L + 4 * rest)
    work = (6 * P + 6 * L * D * config.max_length) * tokens / gpus
    return Paper(
        state=16.0 * P / (1 if copies else gpus),
        whole=0.0 if copies else 10.0 * block + 8.0 * rest + held,
        activations=float(2 * n * D * L + inside if recompute else inside * L),
        logits=10.0 * n * vocabulary,
        sent=sent * ring,
        operations=work * (4 / 3 if recompute else 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--tokens", type=int, default=2**22, help="of a step, over all GPUs")
    parser.add_argument("--at-once", type=int, default=8192, help="tokens on each GPU at a time")
    parser.add_argument("--memory", type=float, default=80, help="GB of each GPU")
    parser.add_argument("--tflops", type=float, default=400, help="that each GPU is taken to do")
    parser.add_argument("--inside", type=float, default=450, help="GB/s that each of up to 8 GPUs is taken to send")
    parser.add_argument("--between", type=float, default=50, help="the same where there are more machines than one")
    args = parser.parse_args()
    print("| model | GPUs | how | recompute | state | whole | activations | logits | sum, GB | fits "
          "| sent, GB | s sending | s computing |")
    print("|---" * 13 + "|")
    for name, (config, vocabulary, tied) in DECODERS.items():
        block, rest = parameters(config, vocabulary, tied)
        exact = f"{name} ({config.num_layers * block + rest:,})"
        for gpus in args.gpus:
            for copies, recompute in ((True, True), (False, False), (False, True)):
                found = paper(config, vocabulary, tied, gpus, args.tokens, args.at_once, args.memory * 1e9,
                              copies, recompute)  # fmt: skip
                parts = (found.state, found.whole, found.activations, found.logits, found.memory)
                cells = [exact, gpus, "ddp" if copies else "fsdp", "yes" if recompute else "no",
                         *(f"{part / 1e9:.1f}" for part in parts),
                         "yes" if found.memory < 0.9e9 * args.memory else "no", f"{found.sent / 1e9:.1f}",
                         f"{found.sent / 1e9 / (args.inside if gpus <= 8 else args.between):.2f}",
                         f"{found.operations / 1e12 / args.tflops:.2f}"]  # fmt: skip
                print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
