"""Training steps a second: ours beside transformers' classes and x-transformers in a plain AdamW loop.

    python benchmarks/training_speed.py [--part decoder|encoder|encoder-decoder] [--sizes 1M,10M,50M] [--minutes N]

A decoder (text-generation beside `LlamaForCausalLM`), an encoder that fills masks (fill-mask beside `BertForMaskedLM`)
and an encoder–decoder (translation beside `MarianMTModel`), each with about 1, 10 and 50 million parameters. Ours is
the package's own `Trainer`, which reads, pads and hides its rows from a store; the peers draw their ids at random.
Batch, sequence length, width, depth, heads, feed-forward parameters and vocabulary are the same for all sides.

as each comes: ours as the shipped recipe of the task is (bfloat16 where the processor has instructions for it, Muon,
its own block, its dropout, without hashed n-grams, which the peers do not have); the peer's class as its configuration
comes: float32, AdamW, its dropout.
float32, bf16: one precision, AdamW and no dropout on every side, and ours with the peer's block: RMSNorm, SwiGLU and
rotary positions as Llama, norms behind and learned positions as BERT, norms behind and sinusoids as Marian.
x-transformers has no pretrained family to be like; it has the same parts by its own options.

Sides take turns, a step each; what counts is the median ratio over the rounds. `--minutes` is for all cases together.
Where matrix products alone are over 85 % of our step, no ratio can be aimed at: the line then shows what share of the
machine's measured ceiling the step reaches. The peers run in a process of their own.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for all sides: busy-waiting threads suffer from any neighbour

import torch
import torch.nn.functional as F
from _common import Aim, arguments, finish
from _pairs import Apart, Rounds, stepper, timed
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from multihead import prepare
from multihead import recipe as recipes
from multihead.run import RunFolder
from multihead.runtime import device
from multihead.runtime.meter import measure
from multihead.task import find
from multihead.train import Trainer

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "language"
DEFAULT_RATIO, SAME_RATIO, PRODUCTS = 2.0, 1.15, 0.85
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
DECODER, ENCODER, BOTH = "decoder", "encoder", "encoder-decoder"
TASKS = {DECODER: "text-generation", ENCODER: "fill-mask", BOTH: "translation"}
PEERS = {DECODER: "LlamaForCausalLM", ENCODER: "BertForMaskedLM", BOTH: "MarianMTModel"}
MASKED = 0.15


@dataclass(frozen=True)
class Shape:
    """One case; picklable, so that the peers' process can be told. `length`: of either side of an encoder–decoder."""

    kind: str
    size: str
    d_model: int
    layers: int
    heads: int
    vocab: int
    rows: int
    length: int

    @property
    def d_ff(self) -> int:
        """Three matrices of a gated part have the parameters of two ungated ones."""
        return -(-self.d_model * 8 // 3 // 32) * 32 if self.kind == DECODER else 4 * self.d_model

    @property
    def tokens(self) -> int:
        return self.rows * self.length * (2 if self.kind == BOTH else 1)


SHAPES = [
    Shape(DECODER, "1M", 128, 4, 4, 2000, 16, 128),
    Shape(DECODER, "10M", 320, 6, 5, 8000, 16, 128),
    Shape(DECODER, "50M", 640, 8, 10, 16000, 8, 128),
    Shape(ENCODER, "1M", 128, 4, 4, 2000, 16, 128),
    Shape(ENCODER, "10M", 320, 6, 5, 8000, 16, 128),
    Shape(ENCODER, "50M", 640, 8, 10, 16000, 8, 128),
    Shape(BOTH, "1M", 128, 2, 4, 2000, 64, 32),
    Shape(BOTH, "10M", 320, 3, 5, 6000, 64, 32),
    Shape(BOTH, "50M", 640, 3, 10, 24000, 32, 32),
]

# -- ours --------------------------------------------------------------------------------------------------------------

DEFAULT = ["model.ngrams=[]"]
"""As the recipe is; n-grams are no part of the shape."""
PLAIN = ["model.ngrams=[]", "model.dropout=0", "train.optimizer=adamw", "train.weight_decay=0.01", "train.ema=null"]
BLOCKS = {
    DECODER: ["model.norm=rmsnorm", "model.activation=swiglu", "model.positions=rotary", "model.bias=false"],
    ENCODER: ["model.norm=layernorm", "model.norm_position=after", "model.activation=gelu", "model.bias=true",
              "model.positions=learned", "model.segments=2", "model.embedding_norm=true"],
    BOTH: ["model.norm=layernorm", "model.norm_position=after", "model.activation=gelu", "model.bias=true",
           "model.positions=sinusoidal"],
}  # fmt: skip


def data(shape: Shape, folder: Path) -> Sequence[str]:
    """Writes texts of characters drawn at random, every one of the vocabulary, and returns what a recipe needs."""
    draw = random.Random(0)
    special = {DECODER: 5, ENCODER: 5, BOTH: 4}[shape.kind]  # of a decoder the end of a line is one, too
    letters = [chr((0x4E00 if i < 20000 else 0x20000 - 20000) + i) for i in range(shape.vocab - special)]
    shortened = {DECODER: 0, ENCODER: 0, BOTH: 1}[shape.kind]  # <eos>
    size = shape.length - shortened
    texts = ["".join(letters[i : i + size]) for i in range(0, len(letters) - size + 1, size)] + [
        "".join(draw.choices(letters, k=size)) for _ in range(8 * shape.rows)] + ["".join(letters[-size:])]  # fmt: skip
    if shape.kind == BOTH:
        place = folder / "pairs.tsv"
        pairs = ["source\ttarget", *(f"{a}\t{b}" for a, b in zip(texts, reversed(texts), strict=True))]
        place.write_text("\n".join(pairs) + "\n", "utf-8")
    else:
        place = folder / "texts.txt"
        place.write_text("\n".join(texts) + "\n", "utf-8")
    room = f"options.max_tokens={shape.length + 1}" if shape.kind == BOTH else f"options.context={shape.length}"
    return [f"data.train={place}", "data.valid=null", *([] if shape.kind == DECODER else ["data.test=null"]),
            "data.split={valid: 0, test: 0}", "options.tokenizer=char", room,
            *(["options.bundle=null"] if shape.kind == ENCODER else []),
            *([] if shape.kind == DECODER else [f"options.vocab_size={shape.vocab}"]),
            f"model.d_model={shape.d_model}", f"model.num_layers={shape.layers}", f"model.num_heads={shape.heads}",
            f"model.max_length={shape.length + 1}", f"train.batch_size={shape.rows}", "train.minutes=null"]  # fmt: skip


def trainer(shape: Shape, run: RunFolder, overrides: Sequence[str]) -> Trainer:
    path = RECIPES / f"{TASKS[shape.kind]}.yaml"
    recipe = recipes.load(path, [*overrides, "train.threads=1"], find=find)
    task = prepare.make_task(recipe, path.parent)
    task.load(run.file("codec"))
    return Trainer(recipe, task, run, progress=False)


def widths(shape: Shape, gated: bool) -> list[str]:
    return [f"model.d_ff={shape.d_ff if gated else 4 * shape.d_model}"]


def products(step: Callable[[], object]) -> float:
    """The share of matrix products in the processor's time of a step."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    own = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear", "aten::addmm_",
           "mkldnn::_linear_pointwise", "aten::_scaled_dot_product_flash_attention_for_cpu",
           "aten::_scaled_dot_product_flash_attention_for_cpu_backward")  # fmt: skip
    return sum(times.get(name, 0.0) for name in own) / sum(times.values())


# -- peers -------------------------------------------------------------------------------------------------------------


class Peer:
    """A model in a plain loop: AdamW as torch has it, gradients clipped at 1, rows drawn at random; a step a call.

    Args:
        loss: model and shape → the loss of rows of that shape.
    """

    def __init__(self, model: nn.Module, shape: Any, loss: Callable[[Any, Any], Tensor],
                 precision: torch.dtype = torch.float32, place: str = "cpu") -> None:
        self.model, self.shape, self.loss, self.precision = model.to(place).train(), shape, loss, precision
        self.place = place
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.parameters = sum(p.numel() for p in model.parameters())

    def __call__(self) -> None:
        low = torch.autocast(self.place, self.precision) if self.precision != torch.float32 else nullcontext()
        with torch.device(self.place), low:
            loss = self.loss(self.model, self.shape)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def drawn(shape: Shape, more: int = 0) -> Tensor:
    return torch.randint(5, shape.vocab, (shape.rows, shape.length + more))


def masked(shape: Shape) -> tuple[Tensor, Tensor]:
    """Ids with some hidden, and labels, −100 where nothing is asked."""
    ids = drawn(shape)
    chosen = torch.rand(ids.shape) < MASKED
    return ids.masked_fill(chosen, 4), ids.masked_fill(~chosen, -100)


def transformers_loss(model: Any, shape: Shape) -> Tensor:
    if shape.kind == DECODER:
        ids = drawn(shape)
        return model(input_ids=ids, labels=ids).loss
    if shape.kind == ENCODER:
        ids, labels = masked(shape)
        return model(input_ids=ids, labels=labels).loss
    return model(input_ids=drawn(shape), labels=drawn(shape)).loss


def transformers_model(shape: Shape, dropout: bool) -> nn.Module:
    import transformers

    d, f, n, h, v, t = shape.d_model, shape.d_ff, shape.layers, shape.heads, shape.vocab, shape.length + 1
    if shape.kind == DECODER:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=v, hidden_size=d, intermediate_size=f, num_hidden_layers=n, num_attention_heads=h,
            max_position_embeddings=t, tie_word_embeddings=True, use_cache=False))  # fmt: skip
    if shape.kind == ENCODER:
        none: dict[str, Any] = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForMaskedLM(transformers.BertConfig(
            vocab_size=v, hidden_size=d, intermediate_size=f, num_hidden_layers=n, num_attention_heads=h,
            max_position_embeddings=t, **none))  # fmt: skip
    return transformers.MarianMTModel(transformers.MarianConfig(
        vocab_size=v, d_model=d, encoder_ffn_dim=f, decoder_ffn_dim=f, encoder_layers=n, decoder_layers=n,
        encoder_attention_heads=h, decoder_attention_heads=h, max_position_embeddings=t, use_cache=False,
        pad_token_id=0, eos_token_id=3, decoder_start_token_id=2, **({} if dropout else {"dropout": 0.0})))  # fmt: skip


def x_loss(model: Any, shape: Shape) -> Tensor:
    if shape.kind == DECODER:
        ids = drawn(shape, 1)
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    if shape.kind == ENCODER:
        ids, labels = masked(shape)
        return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    return model(drawn(shape), drawn(shape, 1))


def x_model(shape: Shape) -> nn.Module:
    import x_transformers as x

    size = {"dim": shape.d_model, "depth": shape.layers, "heads": shape.heads}
    parts: dict[str, Any] = {"attn_dim_head": shape.d_model // shape.heads, "attn_flash": True}
    if shape.kind == DECODER:
        layers = x.Decoder(**size, **parts, use_rmsnorm=True, rotary_pos_emb=True, ff_glu=True, ff_swish=True,
                           ff_no_bias=True, ff_mult=shape.d_ff / shape.d_model)  # fmt: skip
        return x.TransformerWrapper(num_tokens=shape.vocab, max_seq_len=shape.length, attn_layers=layers,
                                    tie_embedding=True, use_abs_pos_emb=False)  # fmt: skip
    if shape.kind == ENCODER:
        layers = x.Encoder(**size, **parts, pre_norm=False)
        return x.TransformerWrapper(num_tokens=shape.vocab, max_seq_len=shape.length, attn_layers=layers,
                                    tie_embedding=True)  # fmt: skip
    sides = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in
             {"depth": shape.layers, "heads": shape.heads, "max_seq_len": shape.length + 1,
              "num_tokens": shape.vocab, "pre_norm": False, **parts}.items()}  # fmt: skip
    return x.XTransformer(dim=shape.d_model, tie_token_emb=True, **sides)


def peers(shape: Shape) -> dict[str, Peer]:
    """All of a case, in the process apart."""
    torch.manual_seed(0)
    found = {"transformers": Peer(transformers_model(shape, True), shape, transformers_loss)}
    for name, precision in PRECISIONS.items():
        found[f"transformers, {name}"] = Peer(transformers_model(shape, False), shape, transformers_loss, precision)
        found[f"x-transformers, {name}"] = Peer(x_model(shape), shape, x_loss, precision)
    return found


# -- a case ------------------------------------------------------------------------------------------------------------


def case(shape: Shape, seconds: float, args: Any) -> tuple[list[Aim], dict[str, Any]]:
    """The aims of one case, and what was seen."""
    gated = shape.kind == DECODER
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given, run = data(shape, folder), str(folder / "run")
        prepare.run_step(RECIPES / f"{TASKS[shape.kind]}.yaml", [*given, *DEFAULT], run)
        opened = RunFolder.open(run)
        own = {"ours": trainer(shape, opened, [*given, *widths(shape, False), *DEFAULT])}
        for name in PRECISIONS:
            same = [*given, *widths(shape, gated), *PLAIN, *BLOCKS[shape.kind], f"train.precision={name}"]
            own[f"ours, {name}"] = trainer(shape, opened, same)
        apart = Apart(peers, shape, clock=args.clock)
        steps = {name: stepper(one) for name, one in own.items()}
        threads = {1, device.cores()}
        found = Rounds({**{name: timed(step, args.clock) for name, step in steps.items()}, **apart.sides}, seconds,
                       threads)  # fmt: skip
        torch.set_num_threads(1)
        shares = {name: products(step) for name, step in steps.items()}
        ceiling = {kind: measure(torch.device("cpu"), kind, budget=1.0) for kind in PRECISIONS.values()}
        ceilings = {name: share_of_ceiling(one, found.seconds(name), ceiling[one.precision])
                    for name, one in own.items()}  # fmt: skip
        sizes = {name: sum(p.numel() for p in one.model.parameters()) for name, one in own.items()} | apart.parameters
        apart.close()
    title = f"{shape.kind} {shape.size}"
    aims = [aim(title, "as each comes", "transformers", "ours", DEFAULT_RATIO, shape, found, shares, ceilings)]
    for name in PRECISIONS:
        aims += [aim(title, name, f"{peer}, {name}", f"ours, {name}", SAME_RATIO, shape, found, shares, ceilings)
                 for peer in ("transformers", "x-transformers")]  # fmt: skip
    seen = {"shape": asdict(shape), "parameters": sizes, "products_share": shares, "share_of_ceiling": ceilings,
            "seconds": {name: found.seconds(name) for name in sizes}, "rounds": len(found.best("ours"))}  # fmt: skip
    return aims, seen


def share_of_ceiling(one: Trainer, seconds: float, ceiling: float) -> float:
    """The operations of the model's forward and backward passes in a step, over those of a large matrix product."""
    meter, indices = one._meter(), one.stepper.loader.batch(0)
    assert meter is not None
    with torch.no_grad():
        count = int(one.task.loss(one.model, one._batch(0, indices, 0)).count)
    return meter.flops * count / seconds / ceiling


def aim(title: str, how: str, peer: str, ours: str, least: float, shape: Shape, found: Rounds,
        shares: dict[str, float], ceilings: dict[str, float]) -> Aim:  # fmt: skip
    library = peer.partition(",")[0]
    ratio, bound = found.ratio(peer, ours), shares[ours] > PRODUCTS
    said = f"{ceilings[ours]:.0%} of the ceiling, products {shares[ours]:.0%}"
    print(f"  {how}, beside {library}: {ratio:.2f} × ({found.seconds(peer) * 1e3:.0f} ms → "
          f"{found.seconds(ours) * 1e3:.0f} ms a step; {said})", flush=True)  # fmt: skip
    wanted = f"{said}: no ratio" if bound and ratio < least else f"ratio ≥ {least:g}: {ratio:.2f}"
    rates = (shape.tokens / found.seconds(side) for side in (peer, ours))
    return Aim(f"{title}, {how}, beside {library}", *rates, "tokens/s", wanted, bound or ratio >= least)


def main() -> int:
    args = arguments(__doc__, 18, [
        ("--part", {"choices": list(TASKS), "help": "only this kind of model"}),
        ("--sizes", {"default": "1M,10M,50M", "help": "only these sizes"}),
    ])  # fmt: skip
    try:
        import transformers
        import x_transformers  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"not run: {error}; pip install transformers x-transformers") from None
    transformers.logging.set_verbosity_error()
    chosen = [s for s in SHAPES if args.part in (None, s.kind) and s.size in args.sizes.split(",")]
    aims, seen = [], {}
    for shape in chosen:
        print(f"{shape.kind} {shape.size}, {PEERS[shape.kind]}, {shape.rows} rows of {shape.length}", flush=True)
        more, seen[f"{shape.kind} {shape.size}"] = case(shape, args.minutes * 60 / len(chosen), args)
        aims += more
    return finish(args, aims, {"cases": seen})


if __name__ == "__main__":
    sys.exit(main())
