"""Tells the tracker of checkpoints, and keeps journal and log of this rank beside each."""

from framework.run.checkpoint import Checkpoints
from framework.run.logs import RunLog
from framework.terminal import Show
from framework.tracking.tracker import Tracker
from framework.train.observers.observer import Kept, Observer, Saved


class CheckpointReport(Observer):
    """What is said of checkpoints; `tracker` and `show` do nothing but on rank 0."""

    def __init__(self, checkpoints: Checkpoints, tracker: Tracker, show: Show, log: RunLog) -> None:
        self._checkpoints, self._tracker = checkpoints, tracker
        self._show, self._log = show, log

    def commit(self, steps_done: int) -> Kept:
        """The tracker's journal, and the log where it does not lie in the run's folder already."""
        path = self._tracker.journal_path
        files = {} if path is None else {"tracking-journal.jsonl": path.read_bytes}
        meta = {"tracker_run_id": self._tracker.run_id}
        return Kept(meta=meta, files=files, spare_files=self._log.files())

    def stalled(self, steps_done: int, seconds: float) -> None:
        """Log how long training stood still."""
        self._tracker.log_metrics({"checkpoint/stall_s": seconds}, steps_done - 1)

    def committed(self, saved: Saved) -> None:
        """Log the checkpoint, or say why there is none."""
        step = saved.steps_done
        if saved.error is not None:
            self._show({"text": f"the checkpoint of step {step} was not written: {saved.error}"})
            return
        self._tracker.log_checkpoint(self._checkpoints.folder(step).url, step)
        self._tracker.log_metrics({"checkpoint/write_s": saved.write_s}, step - 1)

    def end(self, error: BaseException | None) -> None:
        """Mark the run as failed where it did."""
        if error is not None:
            self._tracker.close("FAILED", timeout_s=5)
