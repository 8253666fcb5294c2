"""Speech recognition: spoken digits, Mandarin syllables, and recordings that were made to do harm.

    python benchmarks/speech_recognition.py --part fsdd|syllables|hostile [--json FILE] [--minutes N] [--run DIR]

fsdd: the shipped recipe within `--minutes` (15: preparing, training and evaluating), then the official test part
(recordings 0 to 4 of each digit and speaker) once; the weights are picked on a tenth of the training part. Beside it
the time of answering over the length of what was answered. `--speakers` trains once more for every speaker, without any
of their recordings, and prints the share of their digits right: the official split shares all speakers. An earlier
run folder (`--run`) is gone on with.

syllables: the shipped recipe within `--minutes` (15), and a peer without any learning on the same recordings: the
syllable of the training recording whose log-mel, brought to 64 frames, lies nearest. The validation part is measured
once.

hostile: files that claim too much, hold nothing, are no numbers, a video, or another form than their name says, through
`prepare` and through the server: what is said of each, and how much memory it took.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MULTIHEAD_DATA", str(Path("../shared/data").resolve()))

import numpy as np
import torch
from _common import Aim, arguments, finish

from multihead.build import Run, open_run
from multihead.codec.audio import LogMel, decoded, wav
from multihead.data.audio import from_uri, to_uri
from multihead.data.columns import Column
from multihead.data.rows import open_rows
from multihead.errors import UserError
from multihead.train import train

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "speech"
DATA = Path(os.environ["MULTIHEAD_DATA"])
MINUTES = {"fsdd": 15.0, "syllables": 15.0, "hostile": 2.0}
SHARE = 0.8  # of the time, for training


def learned(recipe: str, place: Path, minutes: float, overrides: list[str]) -> tuple[Run, dict[str, Any], float]:
    """A run of a shipped recipe, what it is worth on its test part, and the seconds all of it took."""
    start = time.perf_counter()
    run = train(RECIPES / f"{recipe}.yaml", [f"train.minutes={minutes * SHARE:g}", *overrides], run=place)
    found = run.evaluate(part="test", progress=False)
    return open_run(place, "cpu"), found, time.perf_counter() - start


def told(metric: dict[str, float]) -> str:
    return f"{metric['value']:.4f} ({metric['low']:.4f} to {metric['high']:.4f})"


# -- digits ------------------------------------------------------------------------------------------------------------


def fsdd(args: Any, folder: Path) -> int:
    run, found, seconds = learned("speech-recognition", args.run or folder / "digits", args.minutes, [])
    right = found["metrics"]["exact"]
    print(f"digits right: {told(right)} of {found['rows']}, all in {seconds / 60:.1f} minutes")
    factor = real_time(run)
    aims = [
        Aim("fsdd: digits right, official test part", None, right["value"], "share", "≥ 0.99", right["value"] >= 0.99),
        Aim("fsdd: preparing, training, evaluating", args.minutes * 60, seconds, "s", "within the budget",
            seconds <= args.minutes * 60),
        Aim("fsdd: time of answering over length", None, factor, "×", "≤ 0.2", factor <= 0.2),
    ]  # fmt: skip
    apart = speakers(args, folder) if args.speakers else {}
    return finish(args, aims, {"test": found, "speakers": apart})


def real_time(run: Run, most: int = 100) -> float:
    """Seconds of answering over seconds of recording, one at a time."""
    store = run.store("test")
    rows = [store.row(i)["audio"] for i in range(min(most, len(store)))]
    length = sum(len(decoded(from_uri(uri))[0]) for uri in rows) / 16000
    run.predict([{"audio": rows[0]}])
    start = time.perf_counter()
    for uri in rows:
        run.predict([{"audio": uri}])
    return (time.perf_counter() - start) / length


def speakers(args: Any, folder: Path) -> dict[str, float]:
    """Share of each speaker's digits right, by a model that never heard them."""
    columns = [Column("audio", "audio", names=("file",)), Column("text", "text", names=("digit",))]
    rows = [dict(row) for part in ("train", "test") for row in open_rows(str(DATA / f"fsdd/{part}.tar"), columns)]
    found = {}
    for name in sorted({row["speaker"] for row in rows}):
        place = folder / name
        place.mkdir()
        for part, wanted in (("train", False), ("test", True)):
            lines = (f"{row['audio']}\t{row['text']}\n" for row in rows if (row["speaker"] == name) is wanted)
            (place / f"{part}.tsv").write_text("audio\tdigit\n" + "".join(lines), "utf-8")
        data = [f"data.{part}={place / part}.tsv" for part in ("train", "test")]
        _, measured, _ = learned("speech-recognition", place / "run", args.minutes, data)
        found[name] = measured["metrics"]["exact"]["value"]
        print(f"without {name}: {told(measured['metrics']['exact'])} of {measured['rows']}", flush=True)
    print(f"mean over speakers: {np.mean(list(found.values())):.4f}")
    return found


# -- syllables ---------------------------------------------------------------------------------------------------------


def pictures(part: str) -> tuple[np.ndarray, list[str]]:
    """Of each recording its log-mel at 64 frames, without what is 40 dB below the loudest before and after, and its
    syllable."""
    columns = [Column("audio", "audio", names=("file",)), Column("text", "text", names=("pinyin",))]
    mel, found, names = LogMel(64, np.zeros(64), np.ones(64)), [], []
    for row in open_rows(str(DATA / f"mandarin-syllables/{part}.tar"), columns):
        samples = torch.from_numpy(decoded(from_uri(row["audio"]))[0])
        x_TM = mel(samples[None], torch.tensor([len(samples)]))[0]
        loud_T = x_TM.exp().sum(1).log()
        at = (loud_T > loud_T.max() - np.log(1e4)).nonzero().flatten()
        x_TM = x_TM[int(at[0]) : int(at[-1]) + 1]
        wide = torch.nn.functional.interpolate(x_TM.mT[None], size=64, mode="linear", align_corners=False)
        found.append(wide.flatten().numpy())
        names.append(f"{row['text']}{row['tone']}")
    return np.stack(found), names


def nearest() -> float:
    """Share of the validation part whose syllable is that of the nearest training recording."""
    (known, names), (asked, truth) = pictures("train"), pictures("valid")
    distance = (asked**2).sum(1)[:, None] - 2 * asked @ known.T + (known**2).sum(1)
    return float(np.mean([names[i] == t for i, t in zip(distance.argmin(1), truth, strict=True)]))


def syllable_part(args: Any, folder: Path) -> int:
    peer = nearest()
    _, found, seconds = learned("mandarin-syllables", args.run or folder / "syllables", args.minutes, [])
    right = found["metrics"]["exact"]
    print(f"nearest neighbour: {peer:.4f}; syllable with tone right: {told(right)}, without tone wrong: "
          f"{told(found['metrics']['toneless_wer'])}; {seconds / 60:.1f} minutes")
    known = {name for name in pictures("train")[1]}
    truth = pictures("valid")[1]
    print(f"of {len(truth)} syllables {sum(t in known for t in truth)} also stand in the training part")
    aims = [Aim("syllables with tone right, validation part", peer, right["value"], "share", "≥ 5 × nearest neighbour",
                right["value"] >= max(5 * peer, 0.05))]  # fmt: skip
    return finish(args, aims, {"test": found, "seconds": seconds})


# -- hostile recordings ------------------------------------------------------------------------------------------------


def hostile_files() -> dict[str, tuple[str, bytes]]:
    """Name of the case → file's name and bytes."""
    import av
    import soundfile

    def flac(seconds: float) -> bytes:
        with io.BytesIO() as file:
            with soundfile.SoundFile(file, "w", 8000, 1, "PCM_16", format="FLAC") as out:
                for _ in range(int(seconds / 60)):
                    out.write(np.zeros(8000 * 60, np.int16))
            return file.getvalue()

    good = wav((np.sin(np.arange(16000) / 6) * 9000).astype(np.int16))
    long = bytearray(flac(60))
    long[18:26] = struct.pack(">Q", (struct.unpack(">Q", bytes(long[18:26]))[0] & ~((1 << 36) - 1)) | 8000 * 36000)
    floats = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + 16000, b"WAVE", b"fmt ", 16, 3, 1, 16000, 64000, 4, 32,
                         b"data", 16000) + np.full(4000, np.nan, "<f4").tobytes()  # fmt: skip
    video = io.BytesIO()
    with av.open(video, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(10):
            out.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        out.mux(stream.encode(None))
    return {
        "header claims 2 GB": ("a.wav", good[:40] + struct.pack("<I", 0x7FFFFFFF) + good[44:]),
        "header claims nothing": ("b.wav", good[:40] + struct.pack("<I", 0) + good[44:]),
        "zero length": ("c.wav", b""),
        "ten hours claimed": ("d.flac", bytes(long)),
        "ten hours of silence": ("e.flac", flac(36000)),
        "NaN samples": ("f.wav", floats),
        "one sample": ("g.wav", wav(np.ones(1, np.int16))),
        "video": ("h.m4a", video.getvalue()),
        "another ending": ("i.mp3", good),
        "text called wav": ("j.wav", b"this is not a recording"),
    }


READABLE = {"header claims 2 GB", "another ending"}


def grown(work: Any) -> tuple[Any, float]:
    """What `work` gives, and by how many MB it raised the most memory this process ever held."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return work(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def hostile(args: Any, folder: Path) -> int:
    from fastapi.testclient import TestClient

    from multihead.prepare import run_step
    from multihead.serve.app import Served, create_app

    tiny = RECIPES.parent / "tiny" / "speech-recognition.yaml"
    rng, place = np.random.default_rng(0), folder / "data"
    place.mkdir()
    rows = []
    for i in range(40):
        (place / f"good{i}.wav").write_bytes(wav(rng.normal(0, 3000, 12000).astype(np.int16)))
        rows.append(f"good{i}.wav\t{'abc'[i % 3]}\n")
    manifest = place / "train.tsv"
    manifest.write_text("audio\ttext\n" + "".join(rows), "utf-8")
    settings = [f"data.train={manifest}", "data.columns.text=text", "data.max_rejected=0.9", "train.steps=2"]
    run = train(tiny, settings, run=folder / "run", progress=False)
    files = hostile_files()
    aims = []
    app = create_app([Served("ears", run.task, run.model)], run.recipe.serve)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for name, (file, raw) in files.items():
            (place / file).write_bytes(raw)
            manifest.write_text("audio\ttext\n" + "".join(rows) + f"{file}\tabc\n", "utf-8")
            (_, report), prepared = grown(lambda: run_step(tiny, settings, folder / "again", restart=True))
            bad = [one for one in report["rejected"]["examples"] if file in one["where"] or ":42" in one["where"]]
            reply, served = grown(lambda: client.post("/v1/audio/transcriptions", files={"file": (file, raw)}))  # noqa: B023
            told_by = {"prepare": bad[0]["message"] if bad else "read", "server": reply.json().get("error", {}).get(
                "message", "read")}  # fmt: skip
            fine = (name in READABLE) == (not bad) == (reply.status_code == 200) and reply.status_code in (200, 422)
            print(f"{name}: prepare: {told_by['prepare']} (+{prepared:.0f} MB) | server: {told_by['server']} "
                  f"(+{served:.0f} MB)", flush=True)
            most = max(prepared, served)
            aims.append(Aim(name, None, most, "MB", "said, or read as it is; < 100 MB", fine and most < 100))
        huge = base64.b64encode(b"RIFF" * 16)
        reply = client.post("/v1/predict", json={"input": {"audio": "data:audio/wav;base64," + huge.decode()}})
        aims.append(Aim("no WAVE in RIFF, over JSON", None, float(reply.status_code), "status", "422",
                        reply.status_code == 422))  # fmt: skip
    assert to_uri(b"")[1] and issubclass(UserError, Exception)
    return finish(args, aims)


def main() -> int:
    part = next((b for a, b in itertools.pairwise(sys.argv) if a == "--part"), "fsdd")
    args = arguments(__doc__, MINUTES.get(part, 1.0), [
        ("--part", {"choices": list(MINUTES), "default": "fsdd", "help": "what to measure"}),
        ("--run", {"type": Path, "help": "a run folder to go on with"}),
        ("--speakers", {"action": "store_true", "help": "also leave every speaker out in turn"}),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return {"fsdd": fsdd, "syllables": syllable_part, "hostile": hostile}[args.part](args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
