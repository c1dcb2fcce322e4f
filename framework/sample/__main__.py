"""`python -m framework.sample run.name=… 'sample.prompts=["…"]'`: prompts to MP4 files."""

from framework.assembly import Assembly
from framework.config import RunConfig, entry
from framework.sample.generate import Prompt
from framework.sample.videos import sample_videos
from framework.storage import Store
from framework.terminal import Terminal
from framework.train.identity import run_store


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
    model, step = Assembly.of(config).load_model(run, sample.checkpoint, sample.weights)
    terminal = Terminal()
    terminal.say(f"sampling {len(prompts)} videos from step {step} of {run.url}")
    for url in sample_videos(
        Assembly.of(config), model, prompts, config.sampler, sample.max_tokens, out
    ):
        terminal.say(f"  {url}")


if __name__ == "__main__":
    entry(main)
