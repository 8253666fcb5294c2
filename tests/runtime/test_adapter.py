"""A saved adapter, loaded by PEFT over the weights it was trained on, gives what ours gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multihead import build
from multihead.runtime import adapter
from multihead.train import train
from multihead.transformer import lora
from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import TokenInput
from multihead.transformer.trunk import Trunk
from multihead.weights import open_origin
from tests.weights import peers

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'multihead[dev]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'multihead[dev]'")

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "intermediate_size": 40, "max_position_embeddings": 32}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 32}
CLASSES = {
    "BertModel": ("BertConfig", SMALL),
    "BertForMaskedLM": ("BertConfig", SMALL),
    "RobertaModel": ("RobertaConfig", {**SMALL, "type_vocab_size": 1}),
    "LlamaForCausalLM": ("LlamaConfig", {**SMALL, "num_key_value_heads": 2}),
    "Qwen3Model": ("Qwen3Config", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
}


class Model(nn.Module):
    def __init__(self, config: TransformerConfig, vocab_size: int, causal: bool) -> None:
        super().__init__()
        self.input, self.trunk = TokenInput(config, vocab_size), Trunk(config, causal)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.trunk(self.input(ids_BT))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("targets", [["attention"], ["all"]])
def test_peft_loads_it_and_says_the_same(kind: str, targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, sizes = CLASSES[kind]
    theirs = getattr(transformers, kind)(getattr(transformers, name)(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "base")
    origin = open_origin(tmp_path / "base")
    config = TransformerConfig(**origin.config)
    ours = Model(config, origin.vocab_size, origin.causal).eval()
    build.take(ours, origin)
    lora.adapt(ours.trunk, 3, 7.0, 0.1, targets)
    for _, module in lora.adapted(ours):
        nn.init.normal_(module.lora_B, std=0.3)
    adapter.save(tmp_path / "adapter", ours, origin, config, build.body(ours))
    ids = torch.randint(2, 40, (3, 9))
    with torch.no_grad():
        before = hidden(theirs, ids)
        loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
        after = hidden(loaded, ids)
        torch.testing.assert_close(ours(ids), after, atol=1e-5, rtol=1e-4)
    assert (after - before).abs().max() > 0.1
    kept = peft.load_peft_weights(str(tmp_path / "adapter"))
    assert set(peft.get_peft_model_state_dict(loaded)) == set(kept)  # nothing left out, nothing left over


def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, output_hidden_states=True).hidden_states[-1]


def test_a_run_from_bert_serves_what_peft_computes_over_the_folder(tmp_path: Path) -> None:
    base = peers.write(tmp_path / "base", peers.peer("Bert", "Model", **peers.ENCODERS["bert"][1]), peers.word_piece())
    rows = [{"text": text, "label": str(i % 2)} for i, text in enumerate(peers.TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe = {
        "task": "text-classification", "name": "r", "data": {"train": "rows.jsonl", "deduplicate": False},
        "options": {"wide": [], "guess": 0, "hidden": 0, "pool": "mean", "max_tokens": 24},
        "model": {"from": "base", "lora": {"rank": 2, "targets": ["attention", "feed_forward"]}},
        "train": {"steps": 8, "batch_size": 8, "lr": 0.05, "threads": 1, "precision": "float32", "ema": None},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe), "utf-8")
    run = train(tmp_path / "r.yaml", run=tmp_path / "run", progress=False)
    theirs = transformers.AutoModel.from_pretrained(base).eval()
    ids = torch.from_numpy(run.task.encode({"text": peers.TEXTS[0]})["ids"]).long()[None]
    assert ids[0, 0] == 2 and ids[0, -1] == 3  # framed by [CLS] and [SEP]
    with torch.no_grad():
        before = theirs(ids).last_hidden_state
        after = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "run" / "adapter")).eval()(ids).last_hidden_state
        torch.testing.assert_close(run.model.trunk(run.model.input(ids)), after, atol=1e-5, rtol=1e-4)  # type: ignore[operator]
    assert (after - before).abs().max() > 0.05


def test_weights_of_our_own_keep_our_names(tmp_path: Path) -> None:
    config = TransformerConfig(d_model=16, num_layers=1, num_heads=2)
    model = Model(config, 11, False)
    lora.adapt(model.trunk, 2, 4.0, 0.0, ["attention"])
    origin = type("Own", (), {"family": "multihead", "path": tmp_path, "causal": False})()
    adapter.save(tmp_path / "adapter", model, origin, config, {"input": "input", "trunk": "trunk"})
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert said["target_modules"] == ["trunk.blocks.0.attention.out", "trunk.blocks.0.attention.qkv"]
    assert (said["r"], said["lora_alpha"]) == (2, 4)
    assert peft.LoraConfig(**{k: v for k, v in said.items() if k != "peft_type"}).r == 2
    assert peft.PeftModel.from_pretrained(Model(config, 11, False), str(tmp_path / "adapter")) is not None
