"""Weights out, for recordings: config.json, model.safetensors, preprocessor_config.json, generation_config.json and the
tokenizer of a Whisper."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multihead.build import Run
from multihead.codec.audio import HOP, RATE, WINDOW
from multihead.codec.processor import FILE
from multihead.data.store import INDEX
from multihead.proving import Proof, transformers
from multihead.run import write_json
from multihead.runtime import checkpoint
from multihead.transformer.config import TransformerConfig
from multihead.weights.out import choose, class_name, outward

TASKS = ("speech-recognition",)


def write(run: Run, folder: Path) -> str:
    """Every file of the folder; the name of the class that loads it."""
    from multihead.export import write_tokenizer

    task, options, held = run.recipe.task, run.task.options.model_dump(), _held(run)
    config = TransformerConfig(**{f.name: getattr(run.recipe.model, f.name) for f in fields(TransformerConfig)})
    family = choose(config, task, options=options)
    tensors, shape = outward(family, config, task, run.model.state_dict(), True, options)
    units, prompts = held.units, held.prompts
    ids = {"pad_token_id": units.pad, "bos_token_id": units.bos, "eos_token_id": units.eos,
           "decoder_start_token_id": prompts.start}
    write_json(folder / "config.json", {**shape, **ids, "vocab_size": units.vocab_size, "dtype": "float32"})
    write_json(folder / FILE, {
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": options["mels"], "sampling_rate": RATE,
        "hop_length": HOP, "n_fft": WINDOW, "chunk_length": held.codec.window // RATE,
        "n_samples": held.codec.window, "nb_max_frames": held.codec.window // HOP, "padding_side": "right",
        "padding_value": 0.0, "return_attention_mask": False,
    })
    write_json(folder / "generation_config.json", {
        **ids, "max_length": options["text_length"], "suppress_tokens": prompts.never,
        "begin_suppress_tokens": prompts.never_first, "no_timestamps_token_id": prompts.plain,
        "is_multilingual": bool(prompts.languages), "task_to_id": {"transcribe": prompts.transcribe},
        "lang_to_id": {f"<|{name}|>": id for name, id in prompts.languages.items()},
    })
    checkpoint.save_weights(folder / "model.safetensors", tensors, {"format": "pt"})
    write_tokenizer(units, folder, (), options["text_length"], units.bos, False, "right")
    return class_name(family, task)


def prove(run: Run, folder: Path, name: str, count: int) -> Proof:
    """Run both on held-out recordings, each through its own frames, a text given. UserError where the logits differ."""
    library, held, proof = transformers(), _held(run), Proof()
    theirs = getattr(library, name).from_pretrained(folder, local_files_only=True).eval()
    frames = library.WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    ours: Any = run.model.cpu().float()
    prompt = held.prompts.ids(run.task.options.language or next(iter(held.prompts.languages), None))
    for samples in itertools.islice(_recordings(run, held.codec.window), count):
        text = held.units.encode("The room was clean. 今天天气很好。")[: ours.decoder.config.max_length - len(prompt)]
        ids_1L = torch.tensor([[*prompt, *text.tolist()]])
        features = frames(samples.astype(np.float32) / 32768, sampling_rate=RATE, return_tensors="pt")
        with torch.inference_mode():
            memory_1SD, sizes_1 = ours.encode(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
            left = ours.head(ours.states(memory_1SD, sizes_1, ids_1L))
            right = theirs(input_features=features["input_features"], decoder_input_ids=ids_1L).logits
        proof.add(left, right)
    proof.judge()
    return proof


def _held(run: Run) -> Any:
    """The task, with its codecs."""
    return run.task


def _recordings(run: Run, window: int) -> Iterator[np.ndarray]:
    """Held-out recordings of the run, evenly spread, (N,) int16; then noise, for a run without data."""
    for part in ("test", "valid"):
        if (run.path / "data" / part / INDEX).is_file():
            store = run.store(part)
            for i in range(0, len(store), max(1, len(store) // 100)):
                yield np.array(store[i]["audio"][:window])
    rng = np.random.default_rng(0)
    while True:
        yield rng.normal(0, 4000, window // 2).clip(-32768, 32767).astype(np.int16)
