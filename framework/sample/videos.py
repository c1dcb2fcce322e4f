"""Prompts to MP4 files and a contact sheet in a store."""

import re
from collections.abc import Sequence

import numpy as np

from framework.contact_sheet import contact_sheet
from framework.printable import printable_page
from framework.sample.generate import Prompt
from framework.storage import Store, join_url
from framework.video import encode


def file_name(number: int, text: str) -> str:
    """`3`, "A red circle!" -> `03-a-red-circle.mp4`."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
    return f"{number:02d}-{slug}.mp4"


def write_videos(prompts: Sequence[Prompt], videos: Sequence[np.ndarray], out: Store) -> list[str]:
    """Write one MP4 a prompt and `contact-sheet.png` into `out`; their URLs, the sheet last.

    videos: as `generate` makes them of the prompts.
    """
    names = []
    for number, (prompt, frames) in enumerate(zip(prompts, videos, strict=True)):
        names.append(file_name(number, prompt.text))
        # H.264 in 4:2:0 wants even sizes: an odd last row or column is repeated.
        odd = [(0, 0), *((0, size % 2) for size in frames.shape[1:3]), (0, 0)]
        out.write(names[-1], encode(np.pad(frames, odd, mode="edge"), prompt.fps))
    sheet = contact_sheet(videos, [printable_page(prompt.text, 400) for prompt in prompts])
    out.write("contact-sheet.png", sheet)
    return [join_url(out.url, name) for name in [*names, "contact-sheet.png"]]
