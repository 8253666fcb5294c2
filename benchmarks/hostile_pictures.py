"""Files made to do harm: each is refused with one message, and takes less than 100 MB of memory to refuse.

    python benchmarks/hostile_pictures.py [--json FILE] [--minutes N]

Twice each: through `prepare`, in a process of its own, as one file among good ones (or as the archive that is named);
and through a server, `multihead serve` on the loopback, as the body of a request. What grows is the process' peak of
resident memory (VmHWM, reset before every file), beside what it held before. `--minutes` is not used.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import select
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from _common import Aim, arguments, finish

from tests import clips

MOST = 100.0  # MB
TINY = {"model": {"d_model": 16, "num_layers": 1, "num_heads": 2},
        "train": {"steps": 2, "batch_size": 8, "threads": 1, "precision": "float32", "device": "cpu"},
        "evaluate": {"bootstrap": 0}}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "image": {"task": "image-classification", "options": {"size": 8, "patch": 4}},
    "video": {"task": "video-classification", "options": {"size": 16, "patch": 8, "frames": 2, "tubelet": 1}},
}


# -- the files ---------------------------------------------------------------------------------------------------------


def good_picture(number: int) -> bytes:
    """A picture of noise."""
    from PIL import Image

    pixels = np.random.default_rng(number).integers(256, size=(20, 20, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG")
        return file.getvalue()


def good_clip(number: int) -> bytes:
    """A clip of noise."""
    rng = np.random.default_rng(number)
    return clips.clip([rng.integers(256, size=(16, 16, 3), dtype=np.uint8) for _ in range(4)])


def bomb(side: int = 50_000) -> bytes:
    """A PNG of side × side black pixels, one bit each: 312 MB behind 300 kB."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    data = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zipped(members: dict[str, bytes], pack: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", pack) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return file.getvalue()


def zip_bomb(name: str = "a/1.bmp", head: bytes = b"BM") -> bytes:
    """A zip of 1 GB of zeros behind 1 MB."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w",
                                                                                     force_zip64=True) as member:
            member.write(head)
            for _ in range(1000):
                member.write(bytes(1_000_000))
        return file.getvalue()


def tar_bomb() -> bytes:
    """A tar.gz of a clip of 300 MB, zeros but for its beginning."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            info = tarfile.TarInfo("a/1.mp4")
            info.size = 300 << 20
            archive.addfile(info, io.BytesIO(b"\0\0\0\x18ftypisom".ljust(info.size, b"\0")))
        return file.getvalue()


def links(ending: str = "jpg") -> bytes:
    """A tar of symbolic links that are called like pictures or clips."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for i, target in enumerate(("/etc/passwd", "../../secret.jpg")):
                info = tarfile.TarInfo(f"a/{i}.{ending}")
                info.type, info.linkname = tarfile.SYMTYPE, target
                archive.addfile(info)
        return file.getvalue()


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
PICTURES: dict[str, Callable[[], bytes]] = {
    "truncated.jpg": lambda: good_picture(0)[:300],
    "bomb-50000x50000.png": bomb,
    "million-frames.gif": lambda: clips.many_frames(10**6),
    "half-million-frames.gif": lambda: clips.many_frames(400_000),
    "picture.svg": lambda: SVG,
    "svg-called.png": lambda: SVG,
    "jpeg-and-zip.jpg": lambda: good_picture(0) + zipped({"index.html": b"<script>alert(1)</script>"}),
    "gif-and-script.gif": lambda: b"GIF89a=1;alert(document.domain)//",
    "html.jpg": lambda: b"<!DOCTYPE html><script>alert(1)</script>",
    "empty.jpg": lambda: b"",
}
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "climbs-out.zip": lambda: zipped({"a/1.jpg": good_picture(1), "../../b/2.jpg": good_picture(2)}),
    "bomb.zip": zip_bomb,
    "links.tar": links,
}
CLIP_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "climbs-out.zip": lambda: zipped({"a/1.mp4": good_clip(1), "../../b/2.mp4": good_clip(2)}),
    "bomb.zip": lambda: zip_bomb("a/1.mp4", b"\0\0\0\x18ftypisom"),
    "bomb.tar.gz": tar_bomb,
    "holes.tar": lambda: clips.sparse(3 << 30),
    "links.tar": lambda: links("mp4"),
}
CLIPS: dict[str, Callable[[], bytes]] = {
    "truncated.mp4": lambda: good_clip(0)[:800],
    "truncated.webm": lambda: clips.clip(clips.ramp(20), "webm")[:600],
    "picture-called.mp4": lambda: good_picture(0),
    "sound-alone.mp4": clips.sound_alone,
    "no-frame.mp4": clips.no_frames,
    "million-frames.gif": lambda: clips.many_frames(10**6),
    "half-million-frames.gif": lambda: clips.many_frames(400_000),
    "screen-65535x65535.gif": lambda: clips.wide_screen(65535, 65535),
    "two-billion-samples.mp4": lambda: clips.many_samples(False),
    "two-billion-in-a-fragment.mp4": lambda: clips.many_samples(True),
    "a-thousand-seconds.mp4": lambda: clips.clip(clips.ramp(3), times=[0, 100, 10**6]),
    "beginning-alone.webm": lambda: b"\x1a\x45\xdf\xa3" + b"\x80" * 3000,
    "playlist.mp4": lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "playlist-behind-ftyp.mp4": lambda: b"\0\0\0\x18ftypisom" + b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n" * 20,
}


# -- prepare -----------------------------------------------------------------------------------------------------------


def memory(pid: int, what: str) -> float:
    """A figure of /proc/PID/status in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(what))


def growth(pid: int, work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and by how much the peak of a process' memory outgrew what it held."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew
    before = memory(pid, "VmRSS")
    found = work()
    return found, memory(pid, "VmHWM") - before


def recipe(kind: str, folder: Path, data: str) -> Path:
    """A tiny recipe on data of the folder."""
    path = folder / f"{kind}.yaml"
    values = {"name": kind, **TASKS[kind], "data": {"train": data, "max_rejected": 0.5}, **TINY}
    path.write_text(json.dumps(values))
    return path


def write_good(kind: str, folder: Path) -> list[str]:
    """Twenty good files; lines of a table of them."""
    lines = []
    for i in range(20):
        name = f"good-{i}.{'jpg' if kind == 'image' else 'mp4'}"
        (folder / name).write_bytes(good_picture(i) if kind == "image" else good_clip(i))
        lines.append(f"{name},{'ab'[i % 2]}")
    return lines


def inside(folder: Path) -> Iterator[dict[str, Any]]:
    """In a process of its own: every file through `prepare`."""
    from multihead.errors import UserError
    from multihead.prepare import run_step

    def told(path: Path) -> list[str]:
        try:
            report = run_step(path, run=folder / "run", restart=True)[1]
        except UserError as error:
            return [str(problem) for problem in error.problems]
        return [f"{one['where']}: {one['message']}" for one in report["rejected"]["examples"]]

    for kind, files in (("image", {**PICTURES, "link.jpg": bytes}), ("video", {**CLIPS, "link.mp4": bytes})):
        place = folder / kind
        place.mkdir()
        lines = write_good(kind, place)
        (place / "table.csv").write_text("\n".join([f"{kind},label", *lines]))
        assert told(recipe(kind, folder, f"{kind}/table.csv")) == []
        for name in files:
            if name.startswith("link."):
                (folder / "secret").write_bytes(good_picture(9) if kind == "image" else good_clip(9))
                (place / name).symlink_to(folder / "secret")
            else:
                (place / name).write_bytes((folder / f"{kind}-{name}").read_bytes())
            (place / "table.csv").write_text("\n".join([f"{kind},label", *lines, f"{name},a"]))
            start = time.perf_counter()
            said, more = growth(os.getpid(), lambda kind=kind: told(recipe(kind, folder, f"{kind}/table.csv")))  # type: ignore[misc]
            yield {"file": f"{kind}: {name}", "told": said, "growth": more, "seconds": time.perf_counter() - start}
            (place / name).unlink()
    for kind, archives in (("image", ARCHIVES), ("video", CLIP_ARCHIVES)):
        for name in archives:
            path, start = recipe(kind, folder, f"{kind}-{name}"), time.perf_counter()
            said, more = growth(os.getpid(), lambda path=path: told(path))  # type: ignore[misc]
            yield {"file": f"{kind}: {name}", "told": said, "growth": more, "seconds": time.perf_counter() - start}


# -- the server --------------------------------------------------------------------------------------------------------


def served(folder: Path) -> Iterator[dict[str, Any]]:
    """Every file as a request to a server of two models."""
    from multihead.train import train

    for kind in TASKS:
        place = folder / f"served-{kind}"
        place.mkdir()
        lines = write_good(kind, place)
        (place / "table.csv").write_text("\n".join([f"{kind},label", *lines]))
        train(recipe(kind, folder, f"served-{kind}/table.csv"), run=folder / f"run-{kind}", progress=False)
    runs = [str(folder / f"run-{kind}") for kind in TASKS]
    command = [sys.executable, "-m", "multihead", "serve", *runs, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"MULTIHEAD_LANG": "en"})
    assert process.stdout is not None
    try:
        address = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        for kind, good in (("image", good_picture(0)), ("video", good_clip(0))):
            assert ask(address, kind, good)[0] == 200
        for kind, files in (("image", {**PICTURES, **ARCHIVES}), ("video", {**CLIPS, **CLIP_ARCHIVES})):
            for name in files:
                raw, start = (folder / f"{kind}-{name}").read_bytes(), time.perf_counter()
                (status, said), more = growth(process.pid, lambda kind=kind, raw=raw: ask(address, kind, raw))  # type: ignore[misc]
                yield {"file": f"{kind}: {name}", "told": [said] if status in (413, 422) else [f"{status}", said],
                       "growth": more, "seconds": time.perf_counter() - start}  # fmt: skip
        for kind in TASKS:
            status, said = ask(address, kind, f"{folder}/served-{kind}/table.csv")
            yield {"file": f"{kind}: a path", "told": [said] if status == 422 else [f"{status}", said], "growth": 0.0,
                   "seconds": 0.0}  # fmt: skip
        for kind, good in (("image", good_picture(0)), ("video", good_clip(0))):
            assert ask(address, kind, good)[0] == 200, "it still answers"
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, kind: str, given: bytes | str) -> tuple[int, str]:
    """Status and message of a request with a file, whatever it is, or with a text, in a picture's or a clip's place."""
    prefix = "data:image/jpeg;base64," if kind == "image" else "data:video/mp4;base64,"
    value = given if isinstance(given, str) else prefix + base64.b64encode(given).decode()
    body = json.dumps({"model": kind, "input": {kind: value}}).encode()
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
    connection.putrequest("POST", "/v1/predict")
    for name, text in (("Content-Type", "application/json"), ("Content-Length", str(len(body)))):
        connection.putheader(name, text)
    connection.endheaders()
    # A body that is too long is answered by its announced length alone; one who goes on sending loses the answer.
    if not (len(body) > 1 << 20 and select.select([connection.sock], [], [], 5)[0]):
        connection.send(body)
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    return reply.status, "" if reply.status == 200 else answer["error"]["message"]


# -- all of it ---------------------------------------------------------------------------------------------------------


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        for found in inside(Path(sys.argv[2])):
            print("RESULT " + json.dumps(found), flush=True)
        return 0
    args = arguments(__doc__, 5.0)
    os.environ["MULTIHEAD_LANG"] = "en"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind, files in (("image", {**PICTURES, **ARCHIVES}), ("video", {**CLIPS, **CLIP_ARCHIVES})):
            for name, make in files.items():
                (folder / f"{kind}-{name}").write_bytes(make())
        child = subprocess.run([sys.executable, __file__, "--inside", str(folder)], stdout=subprocess.PIPE, text=True,
                               check=True)  # fmt: skip
        lines = [line.removeprefix("RESULT ") for line in child.stdout.splitlines() if line.startswith("RESULT ")]
        results = {"prepare": list(map(json.loads, lines)), "server": list(served(folder))}
    aims = []
    for where, found in results.items():
        for one in found:
            said = one["told"][0] if one["told"] else "NOT REFUSED"
            print(f"{where:7}  {one['growth'] / 1e6:6.1f} MB  {one['seconds']:5.1f} s  {one['file']}: {said[:150]}")
        most, refused = max(one["growth"] for one in found) / 1e6, sum(len(one["told"]) == 1 for one in found)
        aims += [
            Aim(f"{where}: files refused with one message", len(found), refused, "files", "all", refused == len(found)),
            Aim(f"{where}: most memory that a file took", None, most, "MB", f"< {MOST}", most < MOST),
        ]
    return finish(args, aims, results)


if __name__ == "__main__":
    sys.exit(main())
