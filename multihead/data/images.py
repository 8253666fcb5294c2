"""What a picture is. In a row it is a data URI, ``data:image/jpeg;base64,…`` (`media`)."""

from __future__ import annotations

import re

from multihead.data.folders import labels_of as labels_of
from multihead.data.media import Media
from multihead.errors import tr

MAX_FRAMES = 10_000
"""Most frames of a GIF whose first is taken for a picture."""


def doubtful(raw: bytes) -> str:
    """Why a file is not what it says, though it begins as a picture: a zip archive at its end, or a film; else ""."""
    end = raw.rfind(b"PK\x05\x06", -66_000)  # the end record of a zip, which says how much stands behind it
    if end >= 0 and int.from_bytes(raw[end + 20 : end + 22], "little") == len(raw) - end - 22:
        return tr("this is a picture and a zip archive at once; save the picture anew",
                  "这个文件既是图片又是 zip 压缩包；请重新保存图片")
    frames = raw.count(b"\x21\xf9\x04") if raw.startswith(b"GIF8") else 0
    if frames > MAX_FRAMES:
        return tr(f"this GIF has about {frames:,} frames; at most {MAX_FRAMES:,} make a picture: save one of them",
                  f"这个 GIF 约有 {frames:,} 帧；作为图片至多 {MAX_FRAMES:,} 帧：请另存其中一帧")
    return ""


PICTURE = Media(
    one=("picture", "图片"),
    kinds=("a picture is a JPEG, PNG, WebP, GIF, BMP, TIFF or PNM file",
           "图片须是 JPEG、PNG、WebP、GIF、BMP、TIFF 或 PNM 文件"),
    example="image/jpeg",
    magic=(
        (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
        (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
        (re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"),
        (re.compile(rb"GIF8[79]a"), "image/gif"),
        (re.compile(rb"BM....\0\0\0\0", re.DOTALL), "image/bmp"),
        (re.compile(rb"II\*\0|MM\0\*"), "image/tiff"),
        (re.compile(rb"P[1-6]\s+(#|\d)"), "image/x-portable-anymap"),
    ),
    others=(
        (re.compile(rb"\s*(<\?xml|<!--|<!DOCTYPE svg|<svg)", re.IGNORECASE), "an SVG or other XML file",
         "SVG 等 XML 文件"),
        (re.compile(rb"\s*<(!DOCTYPE )?html", re.IGNORECASE), "a web page", "网页"),
        (re.compile(rb"....ftyp(heic|heix|mif1|msf1|hevc)", re.DOTALL), "a HEIC photo", "HEIC 照片"),
        (re.compile(rb"....ftypavi[fs]", re.DOTALL), "an AVIF picture", "AVIF 图片"),
        (re.compile(rb"....ftyp", re.DOTALL), "a video", "视频"),
        (re.compile(rb"%PDF-"), "a PDF", "PDF"),
        (re.compile(rb"PK\x03\x04"), "a zip archive", "zip 压缩包"),
        (re.compile(rb"8BPS"), "a Photoshop file", "Photoshop 文件"),
    ),
    endings=(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pgm", ".ppm"),
    doubtful=doubtful,
)  # fmt: skip
HEAD, MAX_BYTES = PICTURE.head, PICTURE.most

kind_of, no_picture, too_large = PICTURE.kind_of, PICTURE.none, PICTURE.too_large
to_uri, from_uri, value = PICTURE.to_uri, PICTURE.from_uri, PICTURE.value
looks_like_path, read_file = PICTURE.looks_like_path, PICTURE.read_file
