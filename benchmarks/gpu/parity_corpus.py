"""Real text as tokens: a carried archive of documents and what the machine itself has of source code and documentation.

`documents(archive)` yields both. The archive is xz; each document in it is a line `group<TAB>path`, its text, and a
zero byte. The machine's own text is Python's library, the installed packages and the C headers. Duplicates count once.
One document in 64, by its digest, is held out. Documents of group `pod` (Perl's manuals; without an archive all text
that is not code) are a domain of their own, kept for fine-tuning.
"""

from __future__ import annotations

import hashlib
import lzma
import multiprocessing
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ENDINGS = {".py", ".pyi", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".md", ".rst", ".txt"}
SIZES = range(300, 600_000)
BATCH_BYTES = 1_000_000
PARTS = ("train", "heldout", "tune", "tune_heldout")


def own_files(limit: int) -> Iterator[tuple[str, bytes]]:
    """(ending, text) of files on this machine, in the order of their paths, up to `limit` bytes of each root."""
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/local/cuda/include", "/usr/include"]
    roots += ["/usr/lib/python3/dist-packages", "/usr/share/doc"]
    for root in roots:
        total = 0
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder) / name
                if path.suffix in ENDINGS and path.is_file() and path.stat().st_size in SIZES and total < limit:
                    text = path.read_bytes()
                    total += len(text)
                    yield path.suffix, text


def documents(archive: Path | None, limit: int) -> Iterator[tuple[str, bytes]]:
    """(group, text) of each different document; at most `limit` bytes from one root of the machine."""
    seen = set()

    def every() -> Iterator[tuple[str, bytes]]:
        if archive is not None:
            for document in lzma.decompress(archive.read_bytes()).split(b"\0"):
                head, _, text = document.partition(b"\n")
                yield head.decode().split("\t")[0], text
        for ending, text in own_files(limit):
            yield ("pod" if archive is None and ending in (".md", ".rst", ".txt") else "own"), text

    for group, text in every():
        digest = hashlib.blake2b(text, digest_size=8).digest()
        if digest not in seen and b"\0" not in text and len(text) in SIZES:
            seen.add(digest)
            yield group, text


def part_of(group: str, text: bytes) -> str:
    """Which of PARTS a document belongs to; by its digest, so that it is the same on every machine."""
    is_held_out = hashlib.blake2b(text, digest_size=8).digest()[0] % 64 == 0
    if group == "pod":
        return "tune_heldout" if is_held_out else "tune"
    return "heldout" if is_held_out else "train"


class Tokenizer:
    """A byte-pair vocabulary from a file of the package `tokenizers`; without one, bytes. 0 separates documents."""

    def __init__(self, path: Path | None):
        self.pairs = None
        if path is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes side by side, one thread each
            from tokenizers import Tokenizer as Pairs

            self.pairs = Pairs.from_file(str(path))
        size = 257 if self.pairs is None else self.pairs.get_vocab_size()
        self.vocabulary = -(-size // 64) * 64

    def __call__(self, texts: list[bytes]) -> np.ndarray:
        if self.pairs is None:
            rows = [np.frombuffer(text, np.uint8).astype(np.uint16) + 1 for text in texts]
        else:
            decoded = [text.decode("utf-8", "replace") for text in texts]
            rows = [np.array(row.ids, np.uint16) for row in self.pairs.encode_batch_fast(decoded)]
        return np.concatenate([np.append(row, np.uint16(0)) for row in rows])


_tokenizer: Tokenizer


def _start(path: Path | None) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(path)


def _tokens(batch: tuple[str, list[bytes]]) -> tuple[str, np.ndarray, int]:
    part, texts = batch
    return part, _tokenizer(texts), sum(map(len, texts))


def batches(found: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, list[bytes]]]:
    """Documents of one part together, about BATCH_BYTES at a time."""
    waiting: dict[str, list[bytes]] = {part: [] for part in PARTS}
    sizes = dict.fromkeys(PARTS, 0)
    for group, text in found:
        part = part_of(group, text)
        waiting[part].append(text)
        sizes[part] += len(text)
        if sizes[part] > BATCH_BYTES:
            yield part, waiting[part]
            waiting[part], sizes[part] = [], 0
    yield from ((part, texts) for part, texts in waiting.items() if texts)


def prepare(folder: Path, archive: Path | None, tokenizer: Path | None, limit: int) -> dict[str, int]:
    """Write `<part>.bin` (uint16) into `folder`; number of tokens of each part, bytes in all, vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    size = 0
    with multiprocessing.Pool(min(os.cpu_count() or 1, 32), _start, (tokenizer,)) as pool:
        for part, tokens, length in pool.imap(_tokens, batches(documents(archive, limit))):
            rows[part].append(tokens)
            size += length
    found = {"vocabulary": Tokenizer(tokenizer).vocabulary, "bytes": size}
    for part, arrays in rows.items():
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
        tokens.tofile(folder / f"{part}.bin")
        found[part] = tokens.size
    return found
