import json
import logging
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

from framework.run import sharded_state
from framework.run.checkpoint import Checkpoints, find_checkpoint, load_weights
from framework.run.format import FORMAT
from framework.run.sharded_state import checksum, load_state, save_state, shapes_of
from framework.storage import Store


def state_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights.a": torch.randn(1000, generator=generator),
        "ema.a": torch.randn(1000, generator=generator),
        "progress": torch.tensor([step, 2**40]),
        "buffers.mask": torch.tensor([True, False, True]),
        "buffers.half": torch.randn(5, generator=generator).bfloat16(),
        "weights.one": torch.randn(1, generator=generator),
    }


SHAPES = {"a": [10, 100], "one": [1]}


def save(checkpoints: Checkpoints, step: int) -> Store:
    folder = checkpoints.begin(step)
    save_state(state_of(step), SHAPES, folder)
    folder.write("ledger/rank-0.json", b"[1, 2]")  # a file of somebody else's
    checkpoints.commit(step, {"epoch": 1, "config": {"lr": 0.1}})
    return folder


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(Store(tmp_path / "checkpoints"))
    for step in (100, 200, 300):
        save(checkpoints, step)
    return checkpoints


def test_tensors_come_back_as_they_were(checkpoints: Checkpoints) -> None:
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 300
    assert latest.meta == {"epoch": 1, "config": {"lr": 0.1}, "step": 300, "format": FORMAT}
    expected = state_of(300)
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    load_state(found, SHAPES, latest.store)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_folders_of_another_name_are_no_checkpoints(checkpoints: Checkpoints) -> None:
    odd = (
        "step-old/COMMITTED",
        "step-/COMMITTED",
        "step-5/COMMITTED",
        "step-\u0661" + "0" * 8 + "/x",
    )
    deeper = ("step-00000400/a/COMMITTED", "old/step-00000400/COMMITTED")
    for name in (*odd, *deeper):
        checkpoints.store.write(name, b"{}")
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 300
    assert checkpoints.committed_steps() == [100, 200, 300]
    checkpoints.retain(keep_last=1)
    assert checkpoints.committed_steps() == [300]
    assert all(checkpoints.store.exists(name) for name in odd)


def test_an_index_names_no_file_outside_its_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    (tmp_path / "private").write_bytes(bytes(4000))
    strange = "../../private"
    store = checkpoints.folder(300)
    index = json.loads(store.read("state/index.json"))
    index["tensors"]["weights.a"]["chunks"] = [[0, 1000, strange, 0]]
    store.write("state/index.json", json.dumps(index).encode())
    with pytest.raises(ValueError, match=f"'{strange}' leads out of {store.url}"):
        load_state({"weights.a": torch.zeros(1000)}, SHAPES, store)
    store.write("COMMITTED", json.dumps({"files": {strange: [4000, ""]}}).encode())
    with pytest.raises(ValueError, match=f"'{strange}' leads out of {store.url}"):
        checkpoints.get(300)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 200


def test_a_part_of_the_state_can_be_read(checkpoints: Checkpoints) -> None:
    found = {"ema.a": torch.zeros(1000)}
    load_state(found, SHAPES, checkpoints.folder(200))
    assert torch.equal(found["ema.a"], state_of(200)["ema.a"])


def test_large_states_are_cut_into_files_and_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_state, "PART_BYTES", 6000)
    monkeypatch.setattr(sharded_state, "READ_BYTES", 1000)
    store = Store(tmp_path)
    save_state(state_of(1), SHAPES, store)
    assert len([name for name in store.list() if name.endswith(".bin")]) == 2
    found = {name: torch.zeros_like(tensor) for name, tensor in state_of(1).items()}
    load_state(found, SHAPES, store)
    assert all(torch.equal(found[name], tensor) for name, tensor in state_of(1).items())


def test_an_uncommitted_checkpoint_does_not_count_and_is_wiped(checkpoints: Checkpoints) -> None:
    folder = checkpoints.begin(400)
    save_state(state_of(400), SHAPES, folder)
    folder.write("state/leftover.bin", b"of an attempt that was killed")
    assert checkpoints.committed_steps() == [100, 200, 300]
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 300

    save(checkpoints, 400)
    assert checkpoints.committed_steps()[-1] == 400
    assert not checkpoints.folder(400).exists("state/leftover.bin")


def test_a_torn_checkpoint_is_skipped_with_a_warning(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    torn = checkpoints.folder(300).local_path() / "state/rank-00000-000.bin"
    torn.write_bytes(torn.read_bytes()[:-1])
    (checkpoints.folder(200).local_path() / "meta.json").unlink()
    with caplog.at_level(logging.WARNING):
        latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 100
    assert "step-00000300 is not whole: state/rank-00000-000.bin has" in caplog.text
    assert "step-00000200 is not whole: meta.json is missing" in caplog.text


def test_a_torn_marker_does_not_count(checkpoints: Checkpoints) -> None:
    marker = checkpoints.folder(300).local_path() / "COMMITTED"
    marker.write_bytes(marker.read_bytes()[:20])
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 200


def test_an_altered_checkpoint_is_found_by_its_checksums(checkpoints: Checkpoints) -> None:
    altered = checkpoints.folder(300).local_path() / "state/rank-00000-000.bin"
    data = bytearray(altered.read_bytes())
    data[1234] ^= 1
    altered.write_bytes(data)
    assert checkpoints.get(300).step == 300
    with pytest.raises(ValueError, match="was altered"):
        checkpoints.get(300, (0, 1))
    latest = checkpoints.latest((0, 1))
    assert latest is not None
    assert latest.step == 200


def test_a_checkpoint_with_a_missing_file_is_not_committed(checkpoints: Checkpoints) -> None:
    folder = checkpoints.begin(400)
    save_state(state_of(400), SHAPES, folder)
    folder.delete("state/rank-00000-000.bin")
    with pytest.raises(OSError, match=r"rank-00000-000\.bin is missing"):
        checkpoints.commit(400, {})
    assert 400 not in checkpoints.committed_steps()


def test_the_marker_names_every_file(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder(100)
    files = json.loads(folder.read("COMMITTED"))["files"]
    assert sorted([*files, "COMMITTED"]) == folder.list()
    assert all(files[name] == [folder.size(name), checksum(folder.read(name))]
               for name in files)  # fmt: skip


def test_retention_keeps_the_newest_whole_ones_and_milestones(checkpoints: Checkpoints) -> None:
    save(checkpoints, 400)
    save(checkpoints, 500)
    (checkpoints.folder(500).local_path() / "state/rank-00000-000.bin").unlink()
    checkpoints.retain(keep_last=2, milestones_every=200)
    assert checkpoints.committed_steps() == [200, 300, 400, 500]
    checkpoints.retain(keep_last=1)
    assert checkpoints.committed_steps() == [400, 500]
    assert not checkpoints.folder(200).exists()
    with pytest.raises(ValueError, match="keep_last=0"):
        checkpoints.retain(0)


def test_find_checkpoint_by_what_a_user_types(checkpoints: Checkpoints, tmp_path: Path) -> None:
    store = checkpoints.store
    assert find_checkpoint(store, "latest").step == 300
    assert find_checkpoint(store, "200").step == 200
    assert find_checkpoint(store, 200).step == 200
    assert find_checkpoint(store, checkpoints.folder(100).url).step == 100
    with pytest.raises(ValueError, match=r"checkpoint=150 .* \[100, 200, 300\]"):
        find_checkpoint(store, "150")
    with pytest.raises(ValueError, match="no committed checkpoint"):
        find_checkpoint(Store(tmp_path / "elsewhere"), "latest")
    with pytest.raises(ValueError, match="not a committed checkpoint"):
        find_checkpoint(store, str(tmp_path / "elsewhere"))


class Small(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def save_model(checkpoints: Checkpoints, model: nn.Module) -> None:
    state = {f"weights.{n}": p.detach().view(-1) for n, p in model.named_parameters()}
    state |= {f"ema.{n}": 2 * p.detach().view(-1) for n, p in model.named_parameters()}
    state["buffers.scale"] = torch.tensor([3.0, 4.0])
    save_state(state, shapes_of(model), checkpoints.begin(1))
    checkpoints.commit(1, {})


def test_weights_or_ema_load_into_a_plain_model(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    trained = Small()
    save_model(checkpoints, trained)
    for which, factor in (("weights", 1), ("ema", 2)):
        fresh = Small().bfloat16() if which == "ema" else Small()
        load_weights(checkpoints.get(1), fresh, which)
        expected = (factor * trained.linear.weight).to(fresh.linear.weight.dtype)
        assert torch.equal(fresh.linear.weight, expected)
        assert fresh.scale.tolist() == [3.0, 4.0]
        assert fresh.scratch.tolist() == [1.0, 1.0]
        assert fresh.linear.weight.requires_grad
    with pytest.raises(ValueError, match="weights='raw'"):
        load_weights(checkpoints.get(1), Small(), "raw")


def test_altered_weights_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files that hold something of what is wanted are looked at."""
    monkeypatch.setattr("framework.run.sharded_state.PART_BYTES", 1)  # a file each tensor
    checkpoints = Checkpoints(Store(tmp_path))
    save_model(checkpoints, Small())
    folder = checkpoints.folder(1)
    tensors = json.loads(folder.read("state/index.json"))["tensors"]

    def file_of(name: str) -> str:
        return str(tensors[name]["chunks"][0][2])

    names = ("weights.linear.weight", "ema.linear.weight", "buffers.scale")
    sound = {name: folder.read(file_of(name)) for name in names}
    for name, refused_for in (
        ("weights.linear.weight", {"weights"}),
        ("ema.linear.weight", {"ema"}),
        ("buffers.scale", {"weights", "ema"}),
    ):
        folder.write(file_of(name), bytes([sound[name][0] ^ 1]) + sound[name][1:])
        for which in ("weights", "ema"):
            if which in refused_for:
                with pytest.raises(ValueError, match=f"{file_of(name)} was altered"):
                    load_weights(checkpoints.get(1), Small(), which)
            else:
                load_weights(checkpoints.get(1), Small(), which)
        folder.write(file_of(name), sound[name])


def test_another_model_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    save_model(checkpoints, Small())
    with pytest.raises(ValueError, match=r"linear\.bias has shape \[4\] there and \[5\]"):
        load_weights(checkpoints.get(1), Small(5))
    with pytest.raises(ValueError, match=r"linear\.bias has shape \[4\] there and None"):
        load_weights(checkpoints.get(1), nn.Sequential())


@pytest.mark.slow
def test_checkpoints_live_on_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    try:
        bucket = urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")
        urllib.request.urlopen(bucket).close()
        checkpoints = Checkpoints(Store("s3://bucket/run/checkpoints"))
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            save(checkpoints, step)
        checkpoints.folder(3).write("state/rank-00000-000.bin", b"torn")
        checkpoints.retain(keep_last=1)
        assert checkpoints.committed_steps() == [2, 3]
        latest = checkpoints.latest((0, 1))
        assert latest is not None
        assert latest.step == 2
        found = {"ema.a": torch.zeros(1000)}
        load_state(found, SHAPES, latest.store)
        assert torch.equal(found["ema.a"], state_of(2)["ema.a"])
    finally:
        server.stop()


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    save_state({"x": torch.zeros(2)}, {}, checkpoints.begin(3))
    folder = checkpoints.commit(3, {}).store
    meta = json.loads(folder.read("meta.json"))
    for found, sentence in (
        (None, "older Longtake; commit"),
        (99, "of format 99, written by a newer"),
    ):
        changed = json.dumps({**meta, "format": found}).encode()
        marker = json.loads(folder.read("COMMITTED"))
        marker["files"]["meta.json"] = [len(changed), checksum(changed)]
        folder.write("meta.json", changed)
        folder.write("COMMITTED", json.dumps(marker).encode())
        with pytest.raises(ValueError, match=sentence):
            find_checkpoint(Store(tmp_path), 3)
