"""fill-mask: what is hidden, what is counted, what is read; against closed forms, slow twins and transformers."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from multihead.codec.foreign import ForeignCodec
from multihead.codec.text import TextCodec
from multihead.codec.words import cut
from multihead.data.store import Store, StoreWriter
from multihead.errors import UserError
from multihead.tasks.language.fill_mask import FillMask
from multihead.train import train
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import MaskedHead

TEXTS = ["房间很干净，服务员也很热情。", "早餐一般，位置不错，离地铁站很近。", "the room was clean and quiet"]
CONFIG = TransformerConfig(d_model=32, num_layers=2, num_heads=2, max_length=256)


def made(**options) -> FillMask:
    task = FillMask(FillMask.Options(**options))
    task.fit([{"text": text} for text in TEXTS])
    return task


def framed() -> FillMask:
    """With somebody else's tokenizer, which puts [CLS] and [SEP] around a text."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "room", "was", "clean", "##er", "and", "quiet"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(names[:5])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    task = FillMask(FillMask.Options(context=8))
    task.codec = ForeignCodec(tokenizer, len(names), {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4})
    return task


def model_of(task: FillMask) -> nn.Module:
    torch.manual_seed(0)
    return task.model(CONFIG).eval().requires_grad_(False)


def collated(task: FillMask, *texts: str):
    return task.collate([task.encode({"text": text}) for text in texts])


def stored(task: FillMask, folder, texts=TEXTS) -> Store:
    with StoreWriter(folder) as writer:
        for text in texts:
            writer.add(task.encode({"text": text}), {"text": text})
    return Store(folder)


# -- what is hidden ----------------------------------------------------------------------------------------------------


def test_fifteen_in_a_hundred_of_them_eighty_ten_ten():
    task, rng = made(), np.random.default_rng(0)
    size = 200_000
    ids = rng.integers(0, task.codec.vocab_size, size=size).astype(np.int32)
    found = task.augment({"ids": ids}, rng)
    asked = found["truth"] > 0
    text = ids >= len(task.codec.special)
    assert not (asked & ~text).any() and (found["truth"][asked] == ids[asked] + 1).all()
    assert asked.sum() == pytest.approx(0.15 * text.sum(), abs=1)
    assert (found["ids"][~asked] == ids[~asked]).all() and found["ids"].dtype == ids.dtype
    hidden, same = found["ids"][asked] == task.codec.mask, found["ids"][asked] == ids[asked]
    other = found["ids"][asked][~hidden & ~same]
    # A token drawn at random is by chance the true one once in V − 5.
    chance = 0.1 / text_ids(task)
    assert hidden.mean() == pytest.approx(0.8, abs=0.01) and same.mean() == pytest.approx(0.1 + chance, abs=0.01)
    assert other.min() >= len(task.codec.special)


def text_ids(task: FillMask) -> int:
    return task.codec.vocab_size - len(task.codec.special)


@pytest.mark.parametrize("length", [1, 3, 10])
def test_short_texts_have_the_same_share_hidden_on_average_and_never_nothing(length):
    task, rng = made(masked=0.25), np.random.default_rng(1)
    ids = np.full(length, len(task.codec.special), dtype=np.int32)
    counts = [int((task.augment({"ids": ids}, rng)["truth"] > 0).sum()) for _ in range(2000)]
    assert min(counts) >= 1
    assert np.mean(counts) == pytest.approx(max(1.0, 0.25 * length), abs=0.05)


def test_words_are_hidden_whole():
    pytest.importorskip("jieba")
    assert cut("服务员也很热情") == ["服务员", "也", "很", "热情"]
    assert "".join(cut(text := " a  b服务员 c\n")) == text
    for kind, text in (("char", TEXTS[0]), ("bpe", TEXTS[2])):
        task, rng = made(tokenizer=kind, whole_words=True, vocab_size=300, masked=0.3), np.random.default_rng(2)
        example = task.encode({"text": text})
        words = np.split(np.arange(len(example["ids"])), np.flatnonzero(example["starts"])[1:])
        spelled = [b"".join(task.codec.token(example["ids"][i]) for i in word).decode() for word in words]
        assert spelled == cut(text)
        shares = []
        for _ in range(400):
            asked = task.augment(example, rng)["truth"] > 0
            assert all(asked[word].all() or not asked[word].any() for word in words)
            shares.append(asked.mean())
        assert np.mean(shares) == pytest.approx(0.3, abs=0.06)


def test_held_out_texts_are_hidden_alike_every_time_and_wherever_they_stand(tmp_path):
    task = made()
    one, two = stored(task, tmp_path / "a"), stored(task, tmp_path / "b", TEXTS[::-1])
    first, again = task.examples(one, "test"), task.examples(two, "valid")
    for i in range(len(TEXTS)):
        a, b, c = first[i], first[i], again[len(TEXTS) - 1 - i]
        for key in ("ids", "truth"):
            assert np.array_equal(a[key], b[key]) and np.array_equal(a[key], c[key])
    assert task.length(first).tolist() == [len(first[i]["ids"]) for i in range(len(first))]


@pytest.mark.parametrize("size", [1, 8, 9, 16, 17, 61])
def test_long_texts_come_in_pieces(tmp_path, size):
    task = made(context=8)
    text = ("房间很干净，服务员也很热情。" * 9)[:size]
    store = stored(task, tmp_path / "s", [text, TEXTS[1]])
    for part in ("train", "test"):
        pieces = task.examples(store, part)
        pieces = pieces if part == "train" else pieces.pieces
        own = [i for i in range(len(pieces)) if pieces.row[i] == 0]
        lengths = pieces.size[own]
        covered = np.zeros(size, int)
        for i in own:
            at = pieces.start[i]
            assert np.array_equal(pieces[i]["ids"], store[0]["ids"][at : at + pieces.size[i]])
            covered[at : at + pieces.size[i]] += 1
        if part == "test":
            assert (covered == 1).all() and lengths.max() - lengths.min() <= 1 and len(own) == -(-size // 8)
        else:
            assert covered.min() == 1 and (lengths == min(8, size)).all()
            assert all(np.diff(pieces.start[own]) <= 4)


def test_bundles_hold_every_text_once_and_count_as_their_texts(tmp_path):
    pytest.importorskip("jieba")
    texts = [("房间很干净，服务员也很热情。" * 9)[:n] for n in (3, 14, 5, 61, 3, 9, 1)]
    task = made(context=16, bundle=20, whole_words=True)
    bundles = task.examples(stored(task, tmp_path / "s", texts), "train")
    pieces, model = bundles.pieces, model_of(task)
    assert sorted(bundles.order.tolist()) == list(range(len(pieces)))
    held = [np.split(bundles[i]["ids"], np.cumsum(bundles[i]["sizes"])[:-1]) for i in range(len(bundles))]
    expected = [pieces[k]["ids"] for k in bundles.order]
    assert all(np.array_equal(a, b) for a, b in zip([p for ps in held for p in ps], expected, strict=True))
    sizes = [len(bundles[i]["ids"]) for i in range(len(bundles))]
    assert max(sizes) <= 20 and task.length(bundles).tolist() == [max(map(len, parts)) for parts in held]
    noisy = [task.augment(bundles[i], np.random.default_rng(i)) for i in range(len(bundles))]
    together = task.loss(model, task.collate(noisy))
    alone = [task.loss(model, task.collate([one])) for one in noisy]
    assert together.count == sum(one.count for one in alone)
    assert float(together.total) == pytest.approx(sum(float(one.total) for one in alone), rel=1e-5)


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_the_hidden_tokens(tmp_path):
    task = made()
    model, examples = model_of(task), task.examples(stored(task, tmp_path / "s"), "test")
    batch = task.collate([examples[i] for i in range(len(examples))])
    loss, slow, hits, near = task.loss(model, batch), 0.0, 0, 0
    answers = task.predict(model, batch, {"evaluate": True})
    for i in range(len(examples)):
        ids, truth = (torch.from_numpy(np.array(examples[i][key])).long() for key in ("ids", "truth"))
        logits_TV = model.head(model(ids[None], torch.ones(1, len(ids), dtype=torch.bool)))[0]
        for t in (truth > 0).nonzero().flatten().tolist():
            slow -= float(logits_TV[t].log_softmax(-1)[truth[t] - 1])
            rank = int((logits_TV[t] > logits_TV[t, truth[t] - 1]).sum())
            hits, near = hits + (rank == 0), near + (rank < 5)
    count = sum(int((examples[i]["truth"] > 0).sum()) for i in range(len(examples)))
    scores = task.score(answers, [{}] * len(answers))
    assert float(loss.total) == pytest.approx(slow, rel=1e-5) and loss.count == count
    assert scores["loss"] == pytest.approx(slow / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(slow / count), rel=1e-4)
    assert (scores["accuracy"], scores["top5_accuracy"]) == pytest.approx((hits / count, near / count))
    weights = np.array([[2.0, 0.0, 1.0]])
    drawn = task.score([answers[0], answers[0], answers[2]], [{}] * 3)
    assert task.score(answers, [{}] * 3, weights=weights)["loss"][0] == pytest.approx(drawn["loss"])
    told = task.figures(answers, [{}] * 3)["samples"]
    assert [one["prompt"].count("▢") for one in told] == [
        int((examples[i]["ids"] == task.codec.mask).sum()) for i in range(3)
    ]


def test_the_head_is_berts():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=16, vocab_size=50, num_hidden_layers=1, num_attention_heads=2)
    theirs = transformers.BertForMaskedLM(config).eval()
    table = nn.Embedding(50, 16)
    head = MaskedHead(16, 50, table, eps=config.layer_norm_eps)
    source = theirs.cls.predictions
    pairs = {"dense": source.transform.dense, "norm": source.transform.LayerNorm, "decoder": source.decoder}
    with torch.no_grad():
        for name, module in pairs.items():
            for kind, weight in module.named_parameters():
                nn.init.normal_(weight)
                head.get_submodule(name).get_parameter(kind).copy_(weight)
        assert head.decoder.weight is table.weight
        x = torch.randn(3, 16)
        torch.testing.assert_close(head(x), source(x), rtol=1e-5, atol=1e-5)


# -- what is read ------------------------------------------------------------------------------------------------------


def test_a_mask_is_read_from_a_text_and_the_blank_before_it_with_the_word():
    task = made()
    ids = task.encode({"text": "房间<mask>净[MASK]"})["ids"]
    assert ids.tolist() == [*task.codec.encode("房间"), task.codec.mask, *task.codec.encode("净"), task.codec.mask]
    pieces = made(tokenizer="bpe", vocab_size=300)
    whole, hidden = pieces.codec.encode("the room was"), pieces.encode({"text": "the <mask> was"})["ids"]
    blank = next(i for i, token in enumerate(whole) if pieces.codec.token(token).startswith(b" "))
    assert hidden[: blank + 1].tolist() == [*whole[:blank], pieces.codec.mask]
    assert task.encode({"text": "\ue000"})["ids"].tolist() == [task.codec.unk]


def test_fillings_are_the_likeliest_tokens():
    task = made()
    model = model_of(task)
    texts = ["房<mask>很干净", "<mask>餐一<mask>，位置不错"]
    together = task.predict(model, collated(task, *texts), {"top_k": 3})
    for text, answer in zip(texts, together, strict=True):
        ids = torch.from_numpy(task.encode({"text": text})["ids"]).long()
        logits = model.head(model(ids[None], torch.ones(1, len(ids), dtype=torch.bool)))[0]
        places = (ids == task.codec.mask).nonzero().flatten().tolist()
        assert len(answer["fillings"]) == len(places)
        for place, fillings in zip(places, answer["fillings"], strict=True):
            likely = logits[place].softmax(-1)
            kept = [i for i in likely.argsort(descending=True).tolist() if task.codec.decode([i]).strip()][:3]
            assert [f["text"] for f in fillings] == [task.codec.decode([i]) for i in kept]
            assert [f["score"] for f in fillings] == pytest.approx([float(likely[i]) for i in kept], rel=1e-4)
    assert len(task.predict(model, collated(task, texts[0]), {})[0]["fillings"][0]) == 5


def test_of_a_long_text_what_stands_around_the_masks_is_read():
    task = made(context=8)
    model = model_of(task)
    text = TEXTS[0] + TEXTS[1] + "<mask>" + TEXTS[2]
    at = len(TEXTS[0] + TEXTS[1])
    window = (TEXTS[0] + TEXTS[1])[at - 4 :] + "<mask>" + TEXTS[2][:3]
    long, short = (task.predict(model, collated(task, t), {})[0] for t in (text, window))
    assert [f["text"] for f in long["fillings"][0]] == [f["text"] for f in short["fillings"][0]]
    both = task.predict(model, collated(task, text, "房<mask>"), {})
    assert both[0]["fillings"][0][0]["score"] == pytest.approx(long["fillings"][0][0]["score"], rel=1e-4)


def test_a_text_is_framed_as_its_tokenizer_says():
    task = framed()
    model, texts = model_of(task), ["the [MASK] was clean", "quiet", "the room was cleaner and quiet"]
    assert task.room == 6
    together = task.embed(model, batch := collated(task, *texts))
    for i, text in enumerate(texts):
        ids = task.encode({"text": text})["ids"]
        pieces = [ids[:6], ids[6:]] if len(ids) > 6 else [ids]
        vectors = []
        for piece in pieces:
            whole = torch.from_numpy(task.codec.frame(piece)).long()[None]
            assert whole[0, 0] == 2 and whole[0, -1] == 3
            vectors.append(model(whole, torch.ones_like(whole, dtype=torch.bool))[0])
        own = F.normalize(torch.cat(vectors).mean(0), dim=-1)
        torch.testing.assert_close(together[i], own, rtol=1e-4, atol=1e-5)
    assert not {"[MASK]", "[CLS]"} & {f["text"] for f in task.predict(model, batch, {"top_k": 9})[0]["fillings"][0]}
    rng = np.random.default_rng(0)
    found = task.collate([task.augment(task.encode({"text": text}), rng) for text in texts])
    loss = task.loss(model, found)
    slow = 0.0
    for ids, truth, n in zip(found["ids"], found["truth"], found["ids_lengths"].tolist(), strict=True):
        whole = torch.from_numpy(task.codec.frame(ids[:n].numpy())).long()[None]
        logits = model.head(model(whole, torch.ones_like(whole, dtype=torch.bool)))[0, 1:-1]
        for t in (truth[:n] > 0).nonzero().flatten().tolist():
            slow -= float(logits[t].log_softmax(-1)[truth[t] - 1])
    assert float(loss.total) == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_weights_of_others_fill_and_embed_as_in_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    from tests.weights import peers

    kind, shape = peers.ENCODERS[name]
    theirs = peers.peer(kind, "MaskedLM", **shape, vocab_size=320)
    mask = {"bert": "[MASK]", "roberta": "<mask>"}[name]
    pieces = peers.word_piece() if name == "bert" else peers.robertas()
    peers.write(tmp_path / "theirs", theirs, pieces, mask_token=mask)
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(peers.TEXTS[:3]), "utf-8")
    recipe = {
        "task": "fill-mask", "name": "x", "data": {"train": str(rows), "split": {"valid": 0, "test": 0}},
        "options": {"context": 48},
        "model": {"from": str(tmp_path / "theirs")}, "train": {"steps": 0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = train(tmp_path / "recipe.yaml", run=tmp_path / "run", progress=False)
    texts = ["The room <mask> clean", "<mask> early in the <mask>!"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "theirs" / "tokenizer.json"), mask_token=mask, pad_token="[PAD]"
    )
    with torch.inference_mode():
        for text, answer in zip(texts, run.predict(texts, top_k=100), strict=True):
            given = tokenizer(text.replace("<mask>", mask), return_tensors="pt", truncation=False)
            places = given["input_ids"][0] == tokenizer.mask_token_id
            logits = theirs(input_ids=given["input_ids"]).logits[0, places]
            assert len(answer["fillings"]) == len(logits)
            for fillings, likely in zip(answer["fillings"], logits.softmax(-1), strict=True):
                scores = likely.sort(descending=True).values.tolist()
                named = {tokenizer.decode([i]).strip().removeprefix("##"): float(likely[i]) for i in likely.argsort()}
                assert len(fillings) > 20 and fillings[0]["score"] <= scores[0] + 1e-6
                for one in fillings[:5]:
                    assert any(one["score"] == pytest.approx(score, rel=1e-3) for score in scores)
                assert named[fillings[0]["text"]] == pytest.approx(fillings[0]["score"], rel=1e-3)
        own = run.task.embed(run.model, collated(run.task, *peers.TEXTS[:3]))
        for vector, text in zip(own, peers.TEXTS[:3], strict=True):
            ids = tokenizer(text, return_tensors="pt", truncation=False)["input_ids"]
            mean = theirs.base_model(input_ids=ids).last_hidden_state[0].mean(0)
            torch.testing.assert_close(vector, F.normalize(mean, dim=-1), rtol=1e-4, atol=1e-5)


def test_a_gap_to_try_is_a_letter_in_the_middle():
    task = made()
    tried = task.sample({"text": TEXTS[0]})["text"]
    assert tried.count("<mask>") == 1 and task.request(tried) == {"text": tried}
    before, after = tried.split("<mask>")
    assert TEXTS[0].startswith(before) and TEXTS[0].endswith(after) and len(before) + len(after) == len(TEXTS[0]) - 1
    assert made(tokenizer="bpe", vocab_size=300).sample({"text": TEXTS[2]})["text"].count("<mask>") == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("房间很干净", "no mask"),
        ({"text": "房间"}, "no mask"),
        ("<mask>" + "房" * 8 + "<mask>", "10 tokens"),
    ],
)
def test_what_cannot_be_filled_is_said(body, words):
    with pytest.raises(UserError, match=words):
        made(context=9).request(body)


def test_words_without_jieba_are_said(monkeypatch):
    from multihead.codec import words

    monkeypatch.setitem(sys.modules, "jieba", None)
    words._jieba.cache_clear()
    task = made(whole_words=True)
    assert task.encode({"text": TEXTS[2]})["starts"].sum() == 6
    with pytest.raises(UserError, match=r"multihead\[zh\]"):
        task.encode({"text": TEXTS[0]})


def test_what_cannot_be_built_is_said():
    with pytest.raises(UserError, match="max_length 256"):
        made(context=257).model(CONFIG)
    task = FillMask()
    task.origin = SimpleNamespace(path="runs/poems", codec=lambda: TextCodec.fit(TEXTS, "char"))
    with pytest.raises(UserError, match="runs/poems has no mask token"):
        task.fit([{"text": TEXTS[0]}])
