"""A run as a GGUF file is the same model in llama.cpp: same tokens of a text, same greedy text."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from multihead.build import Run
from multihead.codec.text import TextCodec
from multihead.errors import UserError
from multihead.export_gguf import export_gguf
from multihead.generation.fast import prepared
from multihead.generation.int8 import dequantized
from multihead.generation.loop import complete, padded
from multihead.generation.sampling import Sampling
from tests.weights.test_export import trained

gguf = pytest.importorskip("gguf", reason="GGUF files are written and read by the package gguf (extra gguf)")
BIG = {"d_model": 64, "num_layers": 2, "num_heads": 4, "max_length": 128}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pairs": ({"num_kv_heads": 2, "rope_llama3": [8.0, 1.0, 4.0, 32.0]}, {"vocab_size": 320}),
    "characters": ({"d_head": 24, "bias": True}, {"tokenizer": "char", "tied": False}),
    "qwen3": ({"qk_norm": True}, {"vocab_size": 300}),
    "qwen2": ({"qkv_bias": True}, {"vocab_size": 300, "tied": False}),
}
TEXTS = ("从前 山上 有", "The room was  clean,\n\n and <eos> it's 12 o'clock", "庙 good\n", " The room")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by name, trained when first asked for."""
    base, known = tmp_path_factory.mktemp("runs"), dict[str, Run]()

    def run(name: str) -> Run:
        if name not in known:
            model, options = RUNS[name]
            known[name] = trained(base / name, "text-generation", {**BIG, **model}, options, steps=20)
        return known[name]

    return run


def held(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors as float32."""
    return {tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            for tensor in gguf.GGUFReader(path).tensors}


def test_its_numbers_are_those_of_precision_int8(made: Any, tmp_path: Path) -> None:
    run = made("pairs")
    export_gguf(run, tmp_path / "a.gguf")
    found, ours = held(tmp_path / "a.gguf"), run.model.state_dict()
    assert torch.equal(found["token_embd.weight"], dequantized(ours["head.linear.weight"]))
    assert torch.equal(found["blk.1.ffn_down.weight"], dequantized(ours["trunk.blocks.1.feed_forward.down.weight"]))
    values = dequantized(ours["trunk.blocks.0.attention.qkv.weight"])[-32:]
    assert torch.equal(found["blk.0.attn_v.weight"], values)
    assert torch.equal(found["output_norm.weight"], ours["trunk.norm.weight"])
    assert "output.weight" not in found


@pytest.mark.parametrize("form", ["gguf", "gguf-f32"])
@pytest.mark.parametrize("name", RUNS)
def test_llama_cpp_writes_the_same_text(made: Any, name: str, form: str, tmp_path: Path) -> None:
    """With float32 token by token; with Q8_0, for which llama.cpp rounds inputs to 8 bits, too, but for tokens that are
    as likely here, up to that rounding."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="runs the file in llama.cpp (pip install llama-cpp-python)")
    run = made(name)
    export_gguf(run, tmp_path / "a.gguf", form)
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), n_ctx=128, n_threads=1, verbose=False, seed=0)
    model, codec = prepared(run.model, "int8" if form == "gguf" else "float32"), run.task.codec
    same = 0
    for text in TEXTS:
        known = text.replace("<eos>", "") if name == "characters" else text
        known = "".join(c for c in known if codec.unk not in codec.encode(c))
        ids = run.task.encode({"text": known})["ids"].tolist()
        assert theirs.tokenize(known.encode(), add_bos=True, special=False) == ids
        wrote = list(islice(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), 24))
        wrote = wrote[: wrote.index(codec.eos) + 1] if codec.eos in wrote else wrote
        ours = complete(model, codec, [ids], Sampling(max_tokens=24, temperature=0.0))[0].ids
        n = next((i for i, (a, b) in enumerate(zip(ours, wrote, strict=False)) if a != b), len(ours))
        same += n == len(ours) == len(wrote)
        if n < len(ours):
            with torch.inference_mode():
                logits_V = model.start(padded([ids + ours[:n]]))[1][0]
            assert form == "gguf" and logits_V[ours[n]] - logits_V[wrote[n]] < 0.05 * logits_V.std()
        else:
            assert theirs.detokenize(wrote).decode("utf-8", "replace") == codec.decode(ours)
    assert same > len(TEXTS) // 2


def test_what_llama_cpp_cannot_express_is_said(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gelu = trained(tmp_path / "gelu", "text-generation", {"activation": "gelu", "ngrams": [2]}, {"vocab_size": 300})
    with pytest.raises(UserError, match=r"model.activation is gelu.*swiglu") as told:
        export_gguf(gelu, tmp_path / "a.gguf")
    assert "model.ngrams" in str(told.value) and not (tmp_path / "a.gguf").exists()
    run = made("pairs")
    monkeypatch.setattr(run.task, "codec", TextCodec.fit(["abc"] * 3, vocab_size=300, normalize="nfkc"))
    with pytest.raises(UserError, match="nfkc"):
        export_gguf(run, tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"mine")
    with pytest.raises(UserError, match="-o"):
        export_gguf(gelu, tmp_path / "a.gguf")
