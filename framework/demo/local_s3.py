"""Run a command beside an S3 server of its own, on this machine, which ends with it.

python -m framework.demo.local_s3 BUCKET KEEP COMMAND…

The server (moto) listens on a free port of loopback and keeps everything in memory. The command
finds it by the environment, as it would find Amazon's: AWS_ENDPOINT_URL and credentials. At its end
all objects but shards and checkpoints are copied to the folder KEEP, the rest is gone.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from framework.storage import Store

NOT_KEPT = (".tar", ".bin")  # shards of clips and of checkpoints
START_TIMEOUT_S = 60.0


@contextlib.contextmanager
def s3_server(bucket: str, log: Path) -> Iterator[dict[str, str]]:
    """A server with one empty bucket; gives the environment variables that lead to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        # A session of its own: Ctrl-C is for the command, which still has to write to the server.
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _make_bucket(f"{url}/{bucket}", server, log)
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "local",
                "AWS_SECRET_ACCESS_KEY": "local",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
        finally:
            server.terminate()
            server.wait(timeout=30)


def _make_bucket(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10).close()
        except urllib.error.HTTPError as error:
            raise SystemExit(f"the S3 server refuses the bucket {url}: {error}") from error
        except OSError as error:
            if server.poll() is not None or time.monotonic() > give_up:
                raise SystemExit(
                    f"the S3 server does not answer; {log} says why (is moto[server] installed?)"
                ) from error
            time.sleep(0.2)
        else:
            return


def copy_results(bucket: str, folder: Path) -> int:
    """Copy what is worth keeping from the bucket; the number of files."""
    store, kept = Store(f"s3://{bucket}"), 0
    for name in store.list():
        if not name.endswith(NOT_KEPT):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.read(name))
            kept += 1
    return kept


def main(arguments: list[str]) -> int:
    """See the module; the exit status is the command's."""
    if len(arguments) < 3:
        print("usage: python -m framework.demo.local_s3 BUCKET KEEP COMMAND…", file=sys.stderr)
        return 2
    bucket, folder, command = arguments[0], Path(arguments[1]), arguments[2:]
    folder.mkdir(parents=True, exist_ok=True)
    with s3_server(bucket, folder / "s3-server.log") as environment:
        os.environ.update(environment)
        process = subprocess.Popen(command)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal gives it to the command as well
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        status = process.wait()
        kept = copy_results(bucket, folder)
    print(f"\nthe S3 server is gone; {kept} objects of it are kept in {folder}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
