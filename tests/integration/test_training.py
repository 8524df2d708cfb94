"""assets/training: every stage runs, goes on where it stopped, and leaves a pipeline that loads."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

SCRIPTS = Path(__file__).parents[2] / "assets" / "training"
pytestmark = pytest.mark.slow


@pytest.fixture
def train(monkeypatch):
    """The script, on few clips."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import train

    monkeypatch.setattr(train, "SHARD", 2)
    monkeypatch.setattr(train, "ENCODED", 2)
    monkeypatch.setattr(train, "STATISTICS", 1)
    monkeypatch.setattr(train, "CACHE", {"small": 4, "large": 2})
    monkeypatch.setattr(train, "BATCH", {"small": 2, "large": 1})
    monkeypatch.setattr("fit.LOG_EVERY", 1)
    # Compiling takes a minute, for a few steps.
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", lambda self: None)
    yield train
    for name in ("train", "parts", "fit"):
        del sys.modules[name]


def run(train, monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *options, "--threads", "1"])
    train.main()


def test_training_leaves_a_pipeline_and_goes_on_from_its_checkpoints(train, tmp_path, monkeypatch):
    work, out = tmp_path / "work", tmp_path / "out"
    places = ("--workdir", str(work), "--output", str(out))
    few = ("--vae-steps", "3", "--steps", "4", "2", "--decoder-steps", "2")
    run(train, monkeypatch, "all", *few, *places)
    pipe = WanPipeline.from_pretrained(out)
    # The latents are those that the transformer was trained on, the decoder is a wider one.
    first = AutoencoderKLWan.from_pretrained(work / "vae", torch_dtype=torch.float16)
    clip = torch.rand(1, 3, 9, 48, 48) * 2 - 1
    modes = [v.float().encode(clip).latent_dist.mode() for v in (first, pipe.vae)]
    assert torch.equal(*modes)
    assert pipe.vae.config.latents_mean == first.config.latents_mean
    assert pipe.vae.decoder.conv_in.out_channels == 2 * first.decoder.conv_in.out_channels
    pipe.set_progress_bar_config(disable=True)
    caption = "a red striped circle moving right on a navy dotted background"
    size = {"height": 48, "width": 48, "num_frames": 9}
    frames = pipe(caption, **size, num_inference_steps=2, output_type="np").frames[0]
    assert frames.shape == (9, 48, 48, 3) and np.isfinite(frames).all()

    run(train, monkeypatch, "transformer", "--steps", "4", "4", *places)
    steps = [json.loads(x)["step"] for x in (work / "transformer.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def fitted(rank: int, folder: str, processes: int) -> None:
    """Fit a layer to a process's share of a batch and save what it has come to."""
    sys.path.insert(0, str(SCRIPTS))
    from fit import fit, share

    torch.set_num_threads(1)
    if processes > 1:
        store = torch.distributed.FileStore(f"{folder}/store", processes)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=60)
        )
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    inputs, targets = torch.randn(8, 4), torch.randn(8, 3)

    def loss_of(_step: int) -> torch.Tensor:
        mine = slice(share()[0], None, share()[1])
        return (layer(inputs[mine]) - targets[mine]).square().mean()

    fit("layer", layer, loss_of, Path(folder), [5])
    torch.save(layer.state_dict(), f"{folder}/{processes}-{rank}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def test_processes_step_as_one_of_the_whole_batch(tmp_path, train):
    apart = tmp_path / "apart"
    apart.mkdir()
    torch.multiprocessing.spawn(fitted, (str(apart), 2), nprocs=2)
    fitted(0, str(tmp_path), 1)
    expected = torch.load(tmp_path / "1-0.pt")
    for rank in range(2):
        found = torch.load(apart / f"2-{rank}.pt")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_processes_that_do_not_divide_a_batch_are_refused(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "share", lambda: (0, 3))
    with pytest.raises(SystemExit):
        run(train, monkeypatch, "vae", "--workdir", str(tmp_path / "work"))
    assert "3 processes do not divide the batches" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_wider_decoder_begins_as_the_narrow_one(train):
    from parts import build_vae, widen

    torch.manual_seed(0)
    narrow, wide = build_vae(), build_vae(96)
    widen(narrow.decoder, wide.decoder)
    wide.post_quant_conv.load_state_dict(narrow.post_quant_conv.state_dict())
    latents = torch.randn(1, 32, 3, 4, 4)
    with torch.no_grad():
        expected, found = (train.decode_unclamped(v, latents) for v in (narrow, wide))
    assert (found - expected).square().mean() < 0.02 * expected.square().mean()


def test_the_outline_is_read_from_latents_that_hold_it(train):
    generator = torch.Generator().manual_seed(0)
    covered = torch.randint(0, 256, (8, 16, 3, 4, 4), generator=generator).byte()
    mixing = torch.randn(32, 16, generator=generator)
    latents = torch.einsum("co,nofhw->ncfhw", mixing, covered / 255) + 0.3
    probe = train.outline_probe(latents, covered)
    difference = torch.randn(16, generator=generator)
    torch.testing.assert_close(probe @ (mixing @ difference), difference, atol=1e-3, rtol=0)


def test_coverage_is_of_the_named_object(train):
    from parts import coverage, render

    from vidaccel.clips import scenes

    scene = scenes.Scene("red", "dotted", "square", "up", "navy", "striped")
    video = render(scene, np.random.default_rng(0), "small")
    covered = coverage(scene, video)
    assert covered.shape == (16, 5, 8, 8) and covered.dtype == torch.uint8
    # The first latent frame is of the first frame, the last of the last two.
    mask = scenes.object_mask(video, "red")
    shares = covered.float().mean((0, 2, 3)) / 255
    assert shares[0] == pytest.approx(mask[0].mean(), abs=2e-3)
    assert shares[4] == pytest.approx(mask[7:].mean(), abs=2e-3)
