"""Captions as UTF-8 bytes: a text encoder without weights or vocabulary files.

Ids: 0 pads, 1 begins, byte b is b + 2. A caption is its beginning, as many bytes as fit, and pads
up to a multiple, so that packs of captions are rectangular; pads are tokens like any other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PAD, BEGIN, FIRST_BYTE = 0, 1, 2


@dataclass(frozen=True)
class ByteTextConfig:
    """`max_tokens`: the longest caption, its beginning included; longer ones are cut.

    `multiple_of`: lengths are rounded up to it, so it must divide `max_tokens`; 1 pads nothing.
    """

    max_tokens: int = 48
    multiple_of: int = 48

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of={self.multiple_of} must be at least 1; 1 pads nothing")
        if self.max_tokens < 1 or self.max_tokens % self.multiple_of:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be a positive multiple of "
                f"multiple_of={self.multiple_of}; try {max(1, self.max_tokens // self.multiple_of)}"
                f" * {self.multiple_of}"
            )

    def build(self) -> "ByteText":
        """The encoder."""
        return ByteText(self)


class ByteText:
    """A `TextEncoder` of ids."""

    vocab_size = FIRST_BYTE + 256

    def __init__(self, config: ByteTextConfig) -> None:
        self.config = config

    @property
    def max_tokens(self) -> int:
        """Of the longest encoded caption; a model that learns a row for each position asks."""
        return self.config.max_tokens

    @property
    def fingerprint(self) -> str:
        """Names the scheme and both lengths."""
        return f"byte-1-{self.config.max_tokens}-{self.config.multiple_of}"

    def _bytes(self, caption: str) -> bytes:
        kept = caption.encode(errors="replace")[: self.config.max_tokens - 1]
        return kept.decode(errors="ignore").encode()  # drops a character that was cut in two

    def _padded(self, num_bytes: int) -> int:
        return -(-(1 + num_bytes) // self.config.multiple_of) * self.config.multiple_of

    def num_tokens(self, caption: str) -> int:
        """Length of `encode(caption)`."""
        return self._padded(len(self._bytes(caption)))

    def encode(self, caption: str) -> Tensor:
        """(k,) int64 ids; the empty caption is a beginning and pads."""
        content = self._bytes(caption)
        ids = torch.full((self._padded(len(content)),), PAD)
        ids[0] = BEGIN
        ids[1 : 1 + len(content)] = torch.tensor(list(content), dtype=torch.long) + FIRST_BYTE
        return ids
