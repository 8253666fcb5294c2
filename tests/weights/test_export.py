"""A run written for transformers is the same model there: same ids, same logits, same texts, and back again the same
weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from multihead import export as exporting
from multihead import strict_yaml
from multihead.build import Run, open_run
from multihead.errors import UserError
from multihead.export import export
from multihead.train import train
from tests.codec.test_foreign import KINDS
from tests.weights import peers

transformers = pytest.importorskip("transformers")
WORDS = ["从前", "山上", "有", "庙", "The", "room", "was", "clean", "and", "Ａ good"]
BERTS = {"norm": "layernorm", "norm_position": "after", "activation": "gelu", "positions": "learned", "bias": True,
         "embedding_norm": True, "ngrams": []}
GPT2S = {"norm": "layernorm", "activation": "gelu_tanh", "positions": "learned", "bias": True}
CLASSES = {"pool": "first", "wide": [], "max_tokens": 32}
ANSWERS = {"max_tokens": 40, "stride": 10, "overlap": False}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("text-generation", {}, {"vocab_size": 300}, "LlamaForCausalLM"),
    "characters": ("text-generation", {"num_kv_heads": 1, "d_head": 12}, {"tokenizer": "char", "tied": False},
                   "LlamaForCausalLM"),
    "qwen3": ("text-generation", {"qk_norm": True}, {"vocab_size": 300}, "Qwen3ForCausalLM"),
    "gpt2": ("text-generation", GPT2S, {"vocab_size": 300}, "GPT2LMHeadModel"),
    "masks": ("fill-mask", BERTS, {}, "BertForMaskedLM"),
    "classes": ("text-classification", BERTS, CLASSES, "BertForSequenceClassification"),
    "several": ("text-classification", {**BERTS, "segments": 1}, {**CLASSES, "multiple": True, "tokenizer": "bpe"},
                "BertForSequenceClassification"),
    "answers": ("question-answering", {**BERTS, "segments": 2}, ANSWERS, "BertForQuestionAnswering"),
    "translation": ("translation", {"dropout": 0.1}, {"vocab_size": 300, "max_tokens": 60},
                    "PegasusForConditionalGeneration"),
}


def rows(task: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(60):
        text = " ".join(WORDS[(i * (k + 3)) % len(WORDS)] for k in range(8)) + f" {i}。"
        if task == "translation":
            found.append({"source": text, "target": f"{i} {text[::-1]}"})
        elif task == "question-answering":
            found.append({"question": f"which {i}?", "context": text, "answers": [{"text": f"{i}"}]})
        else:
            found.append({"text": text} | ({"label": "好" if i % 2 else "bad"} if "class" in task else {}))
    return found


def trained(folder: Path, task: str, model: dict[str, Any], options: dict[str, Any], steps: int = 1) -> Run:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(task))
    (folder / "data.jsonl").write_text(lines, "utf-8")
    sizes = {} if "from" in model else {"d_model": 32, "num_layers": 2, "num_heads": 4, "max_length": 64}
    options = {"context": 16, **options} if task in ("text-generation", "fill-mask") else options
    recipe = {
        "task": task, "data": {"train": "data.jsonl"}, "model": {**sizes, **model}, "options": options,
        "train": {"steps": steps, "batch_size": 4, "threads": 1, "precision": "float32", "optimizer": "adamw"},
        "evaluate": {"bootstrap": 0},
    }
    (folder / "r.yaml").write_text(strict_yaml.dump(recipe), "utf-8")
    train(folder / "r.yaml", run=folder / "run", progress=False)
    return open_run(folder / "run", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by name, trained when first asked for."""
    base, known = tmp_path_factory.mktemp("runs"), dict[str, Run]()

    def run(name: str) -> Run:
        if name not in known:
            task, model, options, _ = RUNS[name]
            known[name] = trained(base / name, task, model, options)
        return known[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_loads_and_says_the_same(made: Any, name: str, tmp_path: Path) -> None:
    run = made(name)
    done = export(run, tmp_path / "out", texts=8)
    assert done.kind == RUNS[name][3] and done.proof is not None
    assert done.proof.rows == 8 and done.proof.difference < 1e-5 < done.proof.scale
    auto = {"text-generation": "AutoModelForCausalLM", "fill-mask": "AutoModelForMaskedLM",
            "text-classification": "AutoModelForSequenceClassification",
            "question-answering": "AutoModelForQuestionAnswering",
            "translation": "AutoModelForSeq2SeqLM"}[RUNS[name][0]]
    loaded, report = getattr(transformers, auto).from_pretrained(done.path, output_loading_info=True)
    assert type(loaded).__name__ == done.kind
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.path)
    text = "The room 房间 Ａ 庙\n😀"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == run.task.codec.encode(text).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == run.task.codec.decode(ids)
    if name in ("classes", "several"):
        assert loaded.config.id2label == dict(enumerate(run.task.labels.names))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_write_the_same_text(made: Any, name: str, tmp_path: Path) -> None:
    run = made(name)
    folder = export(run, tmp_path / "out", texts=1).path
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("从前 山上", return_tensors="pt")
    theirs = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    ours = run.predict(["从前 山上"], max_tokens=12, temperature=0)[0]["text"]
    assert tokenizer.decode(theirs, skip_special_tokens=True) == ours


def test_both_translate_the_same(made: Any, tmp_path: Path) -> None:
    run = made("translation")
    folder = export(run, tmp_path / "out", texts=2).path
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = model.generate(**tokenizer("The room 山上", return_tensors="pt"), max_length=None, max_new_tokens=9)
    ours = run.predict([{"source": "The room 山上"}], max_tokens=9)[0]["text"]
    assert tokenizer.decode(theirs[0], skip_special_tokens=True) == ours


def test_the_answer_of_a_classifier_is_the_same(made: Any, tmp_path: Path) -> None:
    run = made("classes")
    folder = str(export(run, tmp_path / "out", texts=1).path)
    ask = transformers.pipeline("text-classification", model=folder, tokenizer=folder, top_k=None)
    text = "The room was clean 从前"
    theirs = {one["label"]: one["score"] for one in ask([text])[0]}
    assert theirs == pytest.approx(run.predict([text])[0]["scores"], abs=1e-5)


FOREIGN: dict[str, tuple[str, str, Any, str, dict[str, Any]]] = {
    "qwen2": ("qwen2", "qwen", None, "text-generation", {"tied": True}),
    "gpt2": ("gpt2", "gpt2", None, "text-generation", {}),
    "llama": ("llama 3.1", "llama", None, "text-generation", {"tied": False}),
    "qwen3": ("qwen3", "qwen", None, "text-generation", {"tied": False}),
    "bert": ("bert", "bert", "MaskedLM", "fill-mask", {}),
    "roberta": ("roberta", "roberta", "MaskedLM", "fill-mask", {}),
    "bert classes": ("bert", "bert", "SequenceClassification", "text-classification", CLASSES),
    "roberta classes": ("roberta", "roberta", "SequenceClassification", "text-classification", CLASSES),
    "bert answers": ("bert", "bert", "QuestionAnswering", "question-answering", ANSWERS),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_there_and_back_the_bits_are_the_same(name: str, tmp_path: Path) -> None:
    """A folder of transformers, taken as it is by a recipe without a step, and written again."""
    kind, tokens, head, task, options = FOREIGN[name]
    make, names = KINDS[tokens]
    tokenizer = make()
    more: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size() + 3}
    if head == "SequenceClassification":  # not in the order that our own codec would choose
        more |= {"id2label": {0: "好", 1: "bad"}, "label2id": {"好": 0, "bad": 1}}
    if head:
        model = peers.peer(peers.ENCODERS[kind][0], head, **{**peers.ENCODERS[kind][1], **more})
    else:
        model = peers.causal(kind, **more)
    there = peers.write(tmp_path / "there", model, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **names)
    run = trained(tmp_path / "work", task, {"from": str(there)}, options, steps=0)
    back = export(run, tmp_path / "back", texts=3)
    assert back.kind == type(model).__name__ and back.proof is not None and back.proof.difference < 1e-4
    old, new = load_file(there / "model.safetensors"), load_file(back.path / "model.safetensors")
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        unread = 2 if "roberta.embeddings.position" in key else 0  # the first two rows, which RoBERTa never reads
        assert torch.equal(tensor[unread:], new[key][unread:]), key
    configs = [json.loads((folder / "config.json").read_text()) for folder in (there, back.path)]
    assert all(configs[1][key] == configs[0][key] for key in ("model_type", "architectures", "vocab_size"))
    ours, peer = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (back.path, there))
    text = "The room 房间 didn't"
    assert ours(text)["input_ids"] == peer(text)["input_ids"]
    if tokens == "qwen":
        talk = [{"role": "user", "content": "hi"}]
        assert ours.apply_chat_template(talk, tokenize=False) == peer.apply_chat_template(talk, tokenize=False)


def test_a_head_for_other_classes_stays_behind(tmp_path: Path) -> None:
    make, names = KINDS["bert"]
    kind, shape = peers.ENCODERS["bert"]
    model = peers.peer(kind, "SequenceClassification", **{**shape, "vocab_size": 130}, id2label={0: "x", 1: "y"})
    there = peers.write(tmp_path / "there", model, make(), **names)
    run = trained(tmp_path / "work", "text-classification", {"from": str(there)}, CLASSES, steps=0)
    weights = run.model.state_dict()
    assert torch.equal(weights["head.pooler.weight"], model.bert.pooler.dense.weight)
    assert not torch.equal(weights["head.linear.weight"], model.classifier.weight)


@pytest.mark.parametrize("task, model, options, told", [
    ("fill-mask", {}, {}, "model.norm_position is before, not after"),
    ("fill-mask", {**BERTS, "ngrams": [2]}, {}, r"model.ngrams is \[2\], not \[\]"),
    ("text-generation", {"activation": "relu2"}, {"vocab_size": 300}, "model.activation is relu2, not swiglu"),
    ("text-generation", {**GPT2S, "num_kv_heads": 2}, {"vocab_size": 300}, "model.num_kv_heads is 2, not 4"),
    ("translation", {}, {"vocab_size": 300, "max_tokens": 60, "shared_vocabulary": False}, "shared_vocabulary=true"),
    ("translation", {"norm": "rmsnorm"}, {"vocab_size": 300, "max_tokens": 60}, "model.norm is rmsnorm, not layernorm"),
    ("text-classification", BERTS, {**CLASSES, "wide": [1]}, r"options.wide is \(1,\).*options.wide=\[\]"),
])
def test_what_no_class_computes_is_refused_with_its_keys(
    task: str, model: Any, options: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    run = trained(tmp_path / "work", task, model, options)
    with pytest.raises(UserError, match=told):
        export(run, tmp_path / "out", texts=1)
    assert [p.name for p in tmp_path.iterdir()] == ["work"], "nothing is left behind"


def test_an_export_that_differs_is_not_kept(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    real = exporting.outward

    def wrong(*args: Any) -> Any:
        tensors, config = real(*args)
        return {**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.01}, config

    monkeypatch.setattr(exporting, "outward", wrong)
    with pytest.raises(UserError, match="logits differ"):
        export(made("llama"), tmp_path / "out", texts=2)
    assert not any(tmp_path.iterdir())
    assert export(made("llama"), tmp_path / "out", prove=False).proof is None


def test_without_transformers_it_says_so(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--no-proof"):
        export(made("llama"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(UserError, match="-o"):
        export(made("llama"), tmp_path / "full", prove=False)
