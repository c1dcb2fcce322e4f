"""`python -m framework.demo.clips`: the demo's captioned clips, as shards."""

from framework.config import RunConfig, entry
from framework.demo.clips.moving_shapes import write_dataset


def main(config: RunConfig) -> None:
    """Write the clips of `data.synthetic` to `data.shards`."""
    if config.data.synthetic is None:
        raise ValueError("data.synthetic is not set; give data=synthetic")
    print(write_dataset(config.data.synthetic, config.data.shards, processes=2))


if __name__ == "__main__":
    entry(main)
