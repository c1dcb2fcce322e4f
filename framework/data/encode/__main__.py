"""`python -m framework.data.encode`: videos of a manifest to shards of latents."""

from framework.assembly import Assembly
from framework.cluster import connect
from framework.config import RunConfig, entry
from framework.data.encode.job import encode
from framework.printable import printable_page


def main(config: RunConfig) -> None:
    """Encode the clips of `data.manifest` into `data.latents`."""
    assembly = Assembly.of(config)
    assembly.check()
    if not config.data.latents:
        raise ValueError("data.latents is empty: give the URL of a folder for the latents")
    manifest = assembly.on_videos().open_manifest()
    connect(config.cluster)
    report = encode(
        manifest,
        config.data.latents,
        assembly.on_videos().recipe(),
        assembly.encoders(),
        assembly.encoding(),
        config.data.encode,
        lambda done, total: print(f"  {done:,} of {total:,} clips", flush=True),
    )
    print(printable_page(report))


if __name__ == "__main__":
    entry(main)
