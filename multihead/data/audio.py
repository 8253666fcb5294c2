"""What a recording is. In a row it is a data URI, ``data:audio/flac;base64,…`` (`media`)."""

from __future__ import annotations

import re

from multihead.data.media import Media

RECORDING = Media(
    one=("recording", "录音"),
    kinds=("a recording is a WAV, FLAC, MP3, Ogg, Opus, M4A or WebM file",
           "录音须是 WAV、FLAC、MP3、Ogg、Opus、M4A 或 WebM 文件"),
    example="audio/wav",
    magic=(
        (re.compile(rb"(RIFF|RF64)....WAVE", re.DOTALL), "audio/wav"),
        (re.compile(rb"riff.{12}", re.DOTALL), "audio/x-w64"),
        (re.compile(rb"fLaC"), "audio/flac"),
        (re.compile(rb"OggS"), "audio/ogg"),
        (re.compile(rb"ID3[\x02-\x04]|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][^\xff]", re.DOTALL), "audio/mpeg"),
        (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]", re.DOTALL), "audio/aac"),
        (re.compile(rb"....ftyp", re.DOTALL), "audio/mp4"),
        (re.compile(rb"\x1aE\xdf\xa3"), "audio/webm"),
        (re.compile(rb"FORM....AIF[FC]", re.DOTALL), "audio/aiff"),
        (re.compile(rb"\.snd"), "audio/basic"),
        (re.compile(rb"caff\x00\x01"), "audio/x-caf"),
    ),
    others=(
        (re.compile(rb"RIFF....AVI ", re.DOTALL), "a video (AVI)", "视频（AVI）"),
        (re.compile(rb"\x00\x00\x01[\xba\xb3]", re.DOTALL), "a video (MPEG)", "视频（MPEG）"),
        (re.compile(rb"FLV\x01"), "a video (FLV)", "视频（FLV）"),
        (re.compile(rb"\s*<(!DOCTYPE )?html", re.IGNORECASE), "a web page", "网页"),
        (re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", re.DOTALL), "a picture", "图片"),
        (re.compile(rb"PK\x03\x04"), "a zip archive", "zip 压缩包"),
        (re.compile(rb"NIST_1A"), "a NIST SPHERE file", "NIST SPHERE 文件"),
        (re.compile(rb"0&\xb2u\x8ef\xcf\x11"), "a Windows Media file", "Windows Media 文件"),
        (re.compile(rb"#!AMR"), "an AMR file", "AMR 文件"),
        (re.compile(rb"MThd"), "a MIDI file", "MIDI 文件"),
    ),
    endings=(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".aac", ".aif", ".aiff", ".au", ".webm",
             ".caf", ".w64", ".wma", ".amr", ".sph"),
    head=512,
    smaller=("save it as FLAC, Opus or MP3, or cut it", "请存为 FLAC、Opus 或 MP3，或剪短"),
)  # fmt: skip
HEAD, ENDINGS = RECORDING.head, RECORDING.endings

kind_of, no_audio, too_large = RECORDING.kind_of, RECORDING.none, RECORDING.too_large
to_uri, from_uri, value = RECORDING.to_uri, RECORDING.from_uri, RECORDING.value
looks_like_path, read_file = RECORDING.looks_like_path, RECORDING.read_file
