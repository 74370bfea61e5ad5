"""Text -> token ids: bytes as they are, or a tokenizer.json of the `tokenizers` library, given or trained on the sources."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fairexp.config.nearest import nearest
from fairexp.errors import UserError

END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")  # by which of its names a tokenizer may have it


class Tokenizer(Protocol):
    """Texts to ids below `vocab_size`; `end` closes a document."""

    vocab_size: int
    end: int

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text; what isn't whole UTF-8 becomes U+FFFD."""

    def token_bytes(self) -> np.ndarray | None:
        """How many bytes of text each token stands for; None, where that isn't a token's own property."""


class Bytes:
    """256 bytes and the end of a document."""

    vocab_size = 257
    end = 256

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray | None:
        return np.array([1] * 256 + [0], np.uint16)


class FromFile:
    """A tokenizer.json. It is data: nothing of it runs."""

    def __init__(self, path: str | Path, end: str | None = None):
        library = _library()
        try:
            self.tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library has but one kind for all
            raise UserError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())[:200]}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text, and ends no document
        self.vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocabulary.values(), default=0) + 1
        name = end or next((name for name in ENDS if name in self.vocabulary), None)
        if name is None:
            raise UserError(f"{path}: has none of {', '.join(ENDS)}; --end-of-document names its token")
        if name not in self.vocabulary:
            added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
            raise UserError(f"--end-of-document {name}: {path} has no such token{nearest(name, added)}")
        self.end = self.vocabulary[name]

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(each.ids, np.int64) for each in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def token_bytes(self) -> np.ndarray | None:
        """Of a byte-level tokenizer: one a letter, as GPT-2's alphabet has one for each byte."""
        if type(self.tokenizer.decoder).__name__ != "ByteLevel":
            return None
        counts = np.zeros(self.vocab_size, np.int64)
        added = self.tokenizer.get_added_tokens_decoder()
        for token, number in self.vocabulary.items():
            counts[number] = len(token)
        for number, token in added.items():
            counts[number] = 0 if token.special else len(token.content.encode())
        return counts.astype(np.uint16) if counts.max() < 1 << 16 else None


def train(texts: Iterator[bytes], vocab_size: int, out: Path) -> None:
    """A byte-level BPE (Sennrich et al. 2016; GPT-2's splitting into words), written as tokenizer.json."""
    library = _library()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
    tokenizer.save(str(out))


def wanted_vocab(spec: str) -> int | None:
    """The size of the vocabulary that `bpe:SIZE` asks for; None for another spec. UserError: neither."""
    if spec == "bytes":
        return None
    if spec.startswith("bpe"):
        if not (match := re.fullmatch(r"bpe:(\d+)", spec)) or not 257 <= int(match[1]) <= 1 << 22:
            raise UserError(f"--tokenizer {spec}: bpe:SIZE takes a vocabulary of 257 to {1 << 22} tokens")
        return int(match[1])
    if not Path(spec).expanduser().is_file():
        raise UserError(
            f"--tokenizer {spec}: no such file; takes bytes, bpe:SIZE or the path of a tokenizer.json"
            + nearest(spec, ["bytes", "bpe:8192"])
        )
    return None


def load(spec: str, file: Path, end: str | None) -> Tokenizer:
    """The tokenizer; `file`: where its tokenizer.json lies, if it has one."""
    return Bytes() if spec == "bytes" else FromFile(file, end)


def of_shards(root: Path) -> Tokenizer:
    """The tokenizer that the shards in the folder were made with. UserError: there are none."""
    try:
        meta = json.loads((root / "meta.json").read_text(encoding="utf-8"))
        name, end = meta["tokenizer"], meta["settings"]["end_of_document"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{root}: no token shards made by `fairexp prep`") from None
    return load(name, root / "tokenizer.json", end)


def digest(file: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError("this tokenizer needs the tokenizers library: pip install 'fairexp[text]'") from None
    return tokenizers
