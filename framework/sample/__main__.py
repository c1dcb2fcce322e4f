"""Prompts to MP4 files, and into the run's MLflow run.

python -m framework.sample experiment=demo 'sample.prompts=["a red circle over grey"]'
"""

from framework.assembly import Assembly
from framework.config import RunConfig, entry
from framework.run.identity import run_store
from framework.sample.generate import Prompt, generate
from framework.sample.videos import write_videos
from framework.storage import Store
from framework.terminal import Terminal
from framework.tracking.run_tracker import log_files, open_tracker
from framework.trained import load_trained


def main(config: RunConfig) -> None:
    """Sample one video for each prompt and say where it lies."""
    if not config.sample.prompts:
        raise ValueError(
            "sample.prompts is empty; give one or more, e.g. "
            "'sample.prompts=[\"a red circle moves left quickly over grey\"]'"
        )
    sample = config.sample
    prompts = [
        Prompt(text, sample.num_frames, sample.height, sample.width, sample.fps, sample.seed)
        for text in sample.prompts
    ]
    run = run_store(config.run)
    out = Store(sample.out) if sample.out else run.child("samples")
    assembly, terminal = Assembly.of(config), Terminal()
    model, step = load_trained(assembly, run, sample.checkpoint, sample.weights)
    videos = "1 video" if len(prompts) == 1 else f"{len(prompts)} videos"
    terminal.say(f"sampling {videos} from step {step} of {run.url}")
    frames = generate(
        assembly.denoiser(model),
        assembly.encoders(),
        assembly.geometry,
        prompts,
        config.sampler,
        sample.max_tokens,
    )
    urls = write_videos(prompts, frames, out)
    for url in urls:
        terminal.say(f"  {url}")
    # A checkpoint by URL may be another run's.
    if "/" not in sample.checkpoint and run.exists("tracking.json"):
        _track(config, run, out, [url.rsplit("/", 1)[1] for url in urls])


def _track(config: RunConfig, run: Store, out: Store, names: list[str]) -> None:
    tracker = open_tracker(config.tracking, run, config.run.name, "sample")
    log_files(tracker, out, names, "samples")
    tracker.close(None)


if __name__ == "__main__":
    entry(main)
