"""Where Ray Train begins in a worker. It imports nothing: Ray's controller unpickles it as well.

With the work itself and its arguments the controller would import all that a rank needs, for
seconds, before it starts the first worker.
"""


def start(pickled: bytes) -> None:
    """Run `framework.train.rank.worker.work` on its pickled arguments."""
    import pickle

    from framework.train.rank.worker import work

    work(pickle.loads(pickled))
