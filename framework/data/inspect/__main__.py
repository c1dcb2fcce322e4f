"""`python -m framework.data.inspect`: one page on what training will see."""

from framework.assembly import Assembly
from framework.config import RunConfig, entry
from framework.data.inspect.page import inspect
from framework.printable import printable_page
from framework.storage import Store, join_url


def main(config: RunConfig) -> None:
    """Write the page of a run's plan, and print its facts."""
    assembly = Assembly.of(config)
    assembly.check()
    assembly.check_data()
    out = Store(config.run.root).child(f"{config.run.name}.inspect")
    out.delete("manifest.json")  # of the last look; this one is at the data as they are now
    planner = assembly.planner()
    plan, manifest = planner.make(out, 1, lambda text: None), planner.pinned_manifest(out)
    reader = assembly.reader(manifest.shards_url)
    facts = inspect(plan, manifest, reader, config.cluster.max_workers, out)
    for name, value in facts.items():
        print(printable_page(f"  {name:24} {value}"))
    print(join_url(out.url, "report.html").removeprefix("file://"))


if __name__ == "__main__":
    entry(main)
