"""An export computes what its checkpoint's model does, and counts only when it is whole."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn

from framework.batch import Clip, PackedBatch
from framework.config import RunConfig, compose, group_from_flat
from framework.export.__main__ import main, network_of
from framework.export.card import Facts
from framework.export.config import ExportConfig
from framework.export.folder import UNFINISHED, export
from framework.mapping import flatten, to_mapping, unflatten
from framework.run.checkpoint import Checkpoint, Checkpoints
from framework.run.format import FORMAT
from framework.run.sharded_state import save_state, shapes_of
from framework.storage import Store
from model_zoo.convert import WEIGHTS
from model_zoo.folder import Network, load_model
from model_zoo.models.dit import DiTConfig
from model_zoo.models.uvit import UViTConfig
from model_zoo.patchify import patchify
from tests.conftest import relative_l2

WHOLE = 10**10
WAN = Network(
    DiTConfig(hidden_size=24, ffn=40, num_heads=2, depth=2, patch_size=(1, 2, 2), qk_norm="width"),
    3,
    None,
    10,
)
UVIT = Network(UViTConfig(hidden_size=24, ffn=40, num_heads=2, depth=3), 3, None, 10)


def moved(network: Network, by: float) -> nn.Module:
    torch.manual_seed(0)
    model = network.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return model.eval()


def commit(run: Store, step: int, network: Network, meta: dict[str, Any]) -> Checkpoint:
    """A checkpoint whose weights are moved a little and whose EMA is moved more."""
    models = {"weights": moved(network, 0.05), "ema": moved(network, 0.1)}
    state = {
        f"{which}.{name}": parameter.detach().flatten()
        for which, model in models.items()
        for name, parameter in model.named_parameters()
    }
    checkpoints = Checkpoints(run.child("checkpoints"))
    save_state(state, shapes_of(models["ema"]), checkpoints.begin(step))
    return checkpoints.commit(step, meta)


def facts(weights: str = "ema") -> Facts:
    return Facts("a", 1, weights, 2, {"model.hidden_size": 24}, None, None, None, {}, "", "none")


def write(run: Store, network: Network, max_bytes: int = WHOLE, weights: str = "ema") -> Store:
    to = run.child("export")
    checkpoint = commit(run, 1, network, {})
    export(checkpoint, network, facts(weights), to, max_bytes, lambda text: None)
    return to


@pytest.fixture(params=["file", "s3"])
def run(request, tmp_path: Path) -> Store:
    where = tmp_path if request.param == "file" else request.getfixturevalue("s3_bucket")
    return Store(where).child("runs", "a")


def fetch(store: Store, folder: Path) -> Path:
    for name in store.list():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(store.read(name))
    return folder


@pytest.mark.parametrize("network", [WAN, UVIT], ids=["wan", "uvit"])
@pytest.mark.parametrize("max_bytes", [WHOLE, 20_000, 1])
def test_weights_come_back_from_any_store_and_any_shards(
    run: Store, tmp_path: Path, network: Network, max_bytes: int
) -> None:
    to = write(run, network, max_bytes)
    model = load_model(fetch(to, tmp_path / "here"))
    for (name, tensor), expected in zip(
        model.named_parameters(), moved(network, 0.1).parameters(), strict=True
    ):
        assert torch.equal(tensor, expected), name
    files = [name for name in to.list() if name.endswith(".safetensors")]
    assert (files == [WEIGHTS]) == (max_bytes == WHOLE)
    for file in files:
        with safe_open(tmp_path / "here" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118 - no dict
        # What is one tensor of ours stays together: q, k and v are three of Wan's.
        assert sum(sizes) <= max_bytes or len(sizes) <= 3
    if max_bytes != WHOLE:
        index = json.loads(to.read(f"{WEIGHTS}.index.json"))
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())


class Wan(WanTransformer3DModel):
    """diffusers' own, but loaded in one dtype: two of them want the package accelerate."""

    _keep_in_fp32_modules = None


@pytest.mark.parametrize("max_bytes", [WHOLE, 20_000])
@pytest.mark.parametrize("weights", ["ema", "weights"])
def test_diffusers_loads_a_wan_and_computes_the_same(
    tmp_path: Path, max_bytes: int, weights: str
) -> None:
    to = write(Store(tmp_path), WAN, max_bytes, weights)
    wan = Wan.from_pretrained(to.local_path())
    ours = moved(WAN, 0.1 if weights == "ema" else 0.05)
    size, num_text = (3, 4, 6), 5
    latents, text = torch.randn(3, *size), torch.randn(num_text, 10)
    tokens, t = patchify(latents, (1, 2, 2)), torch.tensor([0.3])
    pack = one_clip(tokens, text)
    with torch.no_grad():
        mine = ours(tokens, t, pack, text)
        theirs = wan(latents[None], 1000 * t, text[None], return_dict=False)[0][0]
    assert mine.abs().max() > 0.1
    assert relative_l2(mine, patchify(theirs, (1, 2, 2))) < 1e-5


def one_clip(tokens: Tensor, text: Tensor) -> PackedBatch:
    """A pack of one clip of 3 x 2 x 3 tokens."""
    return PackedBatch.from_clips([Clip(tokens, (3, 2, 3), text, clip_id=0, fps=8.0)])


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty, it holds README\.md; choose another"):
        write(Store(tmp_path), UVIT)
    assert (tmp_path / "export" / "README.md").read_text() == "mine"


def test_an_export_that_stopped_is_no_model_and_is_done_again(tmp_path: Path) -> None:
    """A checkpoint that loses a file stops it in the middle of its shards."""
    run = Store(tmp_path)
    checkpoint, to = commit(run, 1, UVIT, {}), run.child("export")
    (name,) = [name for name in checkpoint.store.list() if name.endswith(".bin")]
    data = checkpoint.store.read(name)

    def lose(_: str) -> None:
        checkpoint.store.write(name, data[: len(data) * 3 // 4])  # the EMA is the second half

    with pytest.raises(EOFError, match="the object ends at"):
        export(checkpoint, UVIT, facts(), to, 20_000, lose)
    assert to.exists(UNFINISHED)
    assert [name for name in to.list() if name.endswith(".safetensors")]
    with pytest.raises(ValueError, match="not written to its end"):
        load_model(to.local_path())

    checkpoint.store.write(name, data)
    deeper = replace(UVIT, config=replace(UVIT.config, depth=5))
    with pytest.raises(ValueError, match=r"tensor blocks.* has shape"):
        export(checkpoint, deeper, facts(), to, WHOLE, lambda text: None)
    export(checkpoint, UVIT, facts(), to, WHOLE, lambda text: None)
    assert to.list() == ["README.md", "config.json", WEIGHTS]
    assert load_model(to.local_path())
    with pytest.raises(ValueError, match="holds a whole export already"):
        export(checkpoint, UVIT, facts(), to, WHOLE, lambda text: None)


def test_an_altered_checkpoint_is_not_given_away(tmp_path: Path) -> None:
    run = Store(tmp_path)
    checkpoint, to = commit(run, 1, UVIT, {}), run.child("export")
    (name,) = [name for name in checkpoint.store.list() if name.endswith(".bin")]
    data = bytearray(checkpoint.store.read(name))
    data[-100] ^= 1
    checkpoint.store.write(name, bytes(data))
    with pytest.raises(ValueError, match=r"was altered .*; name the one before by checkpoint=STEP"):
        export(checkpoint, UVIT, facts(), to, WHOLE, lambda text: None)
    assert to.list() == []


@pytest.fixture
def config(small_line: list[str]) -> RunConfig:
    return compose(
        [*small_line, "export.licence=CC BY 4.0 | mine", "tracking.uri=http://mlflow.our"]
    )


@pytest.fixture
def trained(config: RunConfig, tmp_path: Path) -> Store:
    """The run of `config` with checkpoints of steps 4 and 8, as training leaves it."""
    run = Store(tmp_path / "runs/small")
    flat = json.loads(json.dumps(dict(config.identity.values)))
    run.write("config.json", json.dumps({"format": FORMAT, "config": flat}).encode())
    run.write("manifest.json", b'{"fingerprint": "5ec0ffee"}')
    network = Network(config.model, config.codec.channels, 258, None)
    for step in (4, 8):
        meta = {"config": flat, "plan_digest": "abc123", "code_version": "0.1+gdeadbee"}
        commit(run, step, network, meta)
        rows = [{"step": i, "clips": [1], "loss": i / 10} for i in range(step - 4, step)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        run.write(f"ledger/step-{step:08d}/rank-00000.jsonl", lines.encode())
    return run


def test_the_command_needs_no_more_than_the_runs_name(trained: Store, tmp_path: Path) -> None:
    """Of another model than the default one; the checkpoint knows."""
    main(compose(["run.name=small", f"run.root={tmp_path}/runs"]))
    to = trained.child("export/step-00000008")
    model = load_model(to.local_path())
    network = network_of(Checkpoints(trained.child("checkpoints")).get(8))
    for tensor, expected in zip(model.parameters(), moved(network, 0.1).parameters(), strict=True):
        assert torch.equal(tensor, expected)
    readme = to.read("README.md").decode()
    assert f"DiT, {network.num_parameters():,} parameters" in readme
    assert "moving average (EMA) of the weights after 8 steps" in readme
    assert "5ec0ffee" in readme
    assert "abc123" in readme
    assert "0.1+gdeadbee" in readme
    assert "| train/loss | 0.5500 |" in readme  # of steps 4 to 7
    assert "mean over the last 4 steps" in readme
    assert "| Licence | unknown, ask who trained it |" in readme
    assert "\nmodel.hidden_size: 32\n" in readme
    assert "mlflow.our" not in readme  # where the tracker is


def test_the_card_has_the_evaluation_of_this_checkpoint(
    config: RunConfig, trained: Store, tmp_path: Path
) -> None:
    trained.write("evaluation/step-00000004-weights.json", b'{"metrics": {"eval/loss": 0.25}}')
    chosen = replace(
        config.export, checkpoint="4", weights="weights", to=f"{tmp_path}/out", max_shard_gb=2e-5
    )
    main(replace(config, export=chosen))
    readme = (tmp_path / "out/README.md").read_text()
    assert "| eval/loss | 0.2500 |" in readme
    assert "train/loss" not in readme
    assert r"| Licence | CC BY 4.0 \| mine |" in readme
    assert (tmp_path / f"out/{WEIGHTS}.index.json").exists()
    with pytest.raises(ValueError, match="holds a whole export already"):
        main(replace(config, export=chosen))


def test_a_checkpoint_apart_from_its_run_wants_a_folder(
    config: RunConfig, trained: Store, tmp_path: Path
) -> None:
    apart = fetch(trained.child("checkpoints/step-00000004"), tmp_path / "apart")
    with pytest.raises(ValueError, match=r"apart from its run; give export\.to=FOLDER"):
        main(replace(config, export=ExportConfig(checkpoint=str(apart))))
    main(replace(config, export=ExportConfig(checkpoint=str(apart), to=f"{tmp_path}/out")))
    assert "manifest `not known" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        ("5", r"checkpoint=5 is not in .*; there are \[4, 8\]"),
        ("lates", "lates is not a committed checkpoint"),
        ("ftp://x/y", "scheme 'ftp' is not supported"),
    ],
)
def test_a_checkpoint_that_is_none_is_a_sentence(
    config: RunConfig, trained: Store, checkpoint: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        main(replace(config, export=ExportConfig(checkpoint=checkpoint)))


def test_a_checkpoint_without_a_config_is_refused(tmp_path: Path) -> None:
    checkpoint = commit(Store(tmp_path), 1, UVIT, {})
    with pytest.raises(ValueError, match="no config of a run"):
        network_of(checkpoint)


@pytest.mark.parametrize("option", ["weights=both", "max_shard_gb=0"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"export: {option.split('=')[0]}="):
        compose([f"export.{option}"])


def test_a_group_comes_back_from_a_flat_config(config: RunConfig) -> None:
    mapping = to_mapping(config.model)
    assert unflatten(flatten(mapping)) == mapping
    flat = json.loads(json.dumps(dict(config.identity.values)))
    assert group_from_flat(flat, "model") == config.model
    with pytest.raises(ValueError, match=r"model\.hiden_size: no such key"):
        group_from_flat(flat | {"model.hiden_size": 3}, "model")


@pytest.mark.slow
def test_the_command_line_has_short_names_and_one_sentence(tmp_path: Path) -> None:
    """Options of `export.` go without it; another command must not take them and do nothing."""
    for module, words in (
        ("framework.export", "checkpoint=5 is not in"),
        ("framework.sample", "checkpoint: no such key"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, f"run.root={tmp_path}", "checkpoint=5"],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {words}")
        assert done.stderr.count("\n") == 1
