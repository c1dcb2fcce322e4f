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

    vocab_size = FIRST_BYTE + 256
    dim = None  # text comes as ids

    @property
    def fingerprint(self) -> str:
        """Names the scheme and both lengths."""
        return f"byte-1-{self.max_tokens}-{self.multiple_of}"

    def num_tokens(self, caption: str) -> int:
        """Length of what `ByteText` makes of a caption."""
        return self.padded(len(self.kept_bytes(caption)))

    def kept_bytes(self, caption: str) -> bytes:
        """As many bytes of a caption as fit."""
        kept = caption.encode(errors="replace")[: self.max_tokens - 1]
        return kept.decode(errors="ignore").encode()  # drops a character that was cut in two

    def padded(self, num_bytes: int) -> int:
        """Tokens of a caption of so many bytes: its beginning, and pads."""
        return -(-(1 + num_bytes) // self.multiple_of) * self.multiple_of

    def build(self) -> "ByteText":
        """The encoder."""
        return ByteText(self)


class ByteText:
    """A `TextEncoder` of ids."""

    def __init__(self, config: ByteTextConfig) -> None:
        self.config = config

    def encode(self, caption: str) -> Tensor:
        """(k,) int64 ids; the empty caption is a beginning and pads."""
        content = self.config.kept_bytes(caption)
        ids = torch.full((self.config.padded(len(content)),), PAD)
        ids[0] = BEGIN
        ids[1 : 1 + len(content)] = torch.tensor(list(content), dtype=torch.long) + FIRST_BYTE
        return ids
