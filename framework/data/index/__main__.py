"""`python -m framework.data.index`: shards, or a table of loose files, to a manifest."""

from framework.cluster import connect
from framework.config import RunConfig, entry
from framework.data.index.job import index
from framework.data.index.listing import list_units
from framework.printable import printable_page


def main(config: RunConfig) -> None:
    """Index `data.shards` into `data.manifest`."""
    # A mistake is answered before Ray starts.
    list_units(config.data.shards, config.data.index.anywhere)
    connect(config.cluster)
    report = index(config.data.shards, config.data.manifest, config.data.index)
    print(printable_page(report))


if __name__ == "__main__":
    entry(main)
