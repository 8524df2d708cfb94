import math
import sys
import urllib.request
import warnings
from urllib.error import URLError

import numpy as np
import pytest
import torch

from vidaccel.clips import metrics
from vidaccel.errors import MetricUnavailable, VideoError


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(20, 230, (5, 32, 48, 3), dtype=np.uint8)


@pytest.fixture
def noisy(clip) -> np.ndarray:
    noise = np.random.default_rng(1).integers(-20, 21, clip.shape)
    return (clip + noise).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("lpips")
    return metrics.load_lpips("squeeze", pretrained=False)


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """An empty weight cache and no network."""

    def refuse(request, timeout):
        assert timeout <= 10
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    metrics.load_lpips.cache_clear()
    yield
    metrics.load_lpips.cache_clear()


def test_psnr_is_that_of_the_whole_clip(clip):
    assert metrics.psnr(clip, clip) == math.inf
    assert metrics.psnr(clip, clip + np.uint8(5)) == pytest.approx(20 * math.log10(255 / 5))
    one_bad_frame = clip.copy()
    one_bad_frame[0] += 5
    assert metrics.psnr(clip, one_bad_frame) == pytest.approx(
        20 * math.log10(255 / 5) + 10 * math.log10(5)
    )


def test_psnr_does_not_overflow():
    black, white = np.zeros((2, 64, 64, 3), np.uint8), np.full((2, 64, 64, 3), 255, np.uint8)
    assert metrics.psnr(black, white) == pytest.approx(0)


def test_clips_of_different_forms_compare(clip):
    tensor = torch.from_numpy(clip / 255).permute(0, 3, 1, 2)
    assert metrics.psnr(clip, tensor) == math.inf


@pytest.mark.parametrize("size", [3, 4, 6, 7, 32])
def test_ssim_works_on_small_frames(clip, noisy, size):
    pytest.importorskip("skimage")
    clip, noisy = clip[:, :size, :size], noisy[:, :size, :size]
    assert metrics.ssim(clip, clip) == pytest.approx(1)
    assert 0 < metrics.ssim(clip, noisy) < 1


def test_ssim_orders_by_damage(clip, noisy):
    pytest.importorskip("skimage")
    assert metrics.ssim(clip, noisy) > metrics.ssim(clip, clip[::-1])


def test_ssim_names_its_limits(clip, monkeypatch):
    with pytest.raises(VideoError, match="3 pixels"):
        metrics.ssim(clip[:, :2], clip[:, :2])
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(MetricUnavailable, match=r"pip install \"vidaccel\[metrics\]\""):
        metrics.ssim(clip, clip)


def test_lpips_is_a_distance(clip, noisy, model):
    assert metrics.lpips(clip, clip, model=model) == 0
    there, back = metrics.lpips(clip, noisy, model=model), metrics.lpips(noisy, clip, model=model)
    assert there > 0
    assert there == pytest.approx(back, rel=1e-4)


def test_lpips_does_not_depend_on_the_batch(clip, noisy, model, monkeypatch):
    whole = metrics.lpips(clip, noisy, model=model)
    monkeypatch.setattr(metrics, "LPIPS_PIXELS", 2 * 64 * 96)
    assert metrics.lpips(clip, noisy, model=model) == pytest.approx(whole, rel=1e-4)


def test_lpips_takes_tiny_and_read_only_frames(clip, noisy, model):
    clip, noisy = np.broadcast_to(clip[:1, :8, :8], (3, 8, 8, 3)), noisy[:3, :8, :8]
    assert metrics.lpips(clip, noisy, model=model) > 0


def test_loading_lpips_is_silent_and_draws_no_random_numbers(capfd):
    pytest.importorskip("lpips")
    metrics.load_lpips.cache_clear()
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = metrics.load_lpips("squeeze", pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert metrics.load_lpips("squeeze", pretrained=False) is loaded


def test_lpips_without_weights_and_network_says_where_they_go(clip, no_weights, tmp_path):
    pytest.importorskip("lpips")
    with pytest.raises(MetricUnavailable, match=r"alex weights.*no network.*https://") as error:
        metrics.lpips(clip, clip)
    assert str(tmp_path) in str(error.value)


def test_lpips_takes_cached_weights_without_a_network(clip, noisy, no_weights, tmp_path):
    pytest.importorskip("lpips")
    from torchvision.models import squeezenet1_1

    cached = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir(parents=True)
    weights = squeezenet1_1().state_dict()
    torch.save(weights, cached)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = metrics.load_lpips("squeeze")
    assert torch.equal(next(model.net.parameters()), weights["features.0.weight"])
    assert metrics.lpips(clip, noisy, model=model) > 0


def test_lpips_with_damaged_weights_says_what_to_remove(no_weights, tmp_path):
    pytest.importorskip("lpips")
    cached = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"not weights")
    with pytest.raises(MetricUnavailable, match="remove"):
        metrics.load_lpips("squeeze")


def test_lpips_names_its_backbones():
    with pytest.raises(MetricUnavailable, match=r"'alex', 'vgg', 'squeeze'.*'resnet'"):
        metrics.load_lpips("resnet")


def test_lpips_without_the_package_says_what_to_install(monkeypatch):
    metrics.load_lpips.cache_clear()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MetricUnavailable, match=r"pip install \"vidaccel\[metrics\]\""):
        metrics.load_lpips()


def test_flicker_is_the_mean_change_between_frames():
    still = np.full((4, 8, 8, 3), 100, np.uint8)
    assert metrics.flicker(still) == 0
    assert metrics.flicker(still[:1]) == 0
    still[1] += 30
    assert metrics.flicker(still) == pytest.approx(20)  # 30, 30 and 0


def test_worst_knows_which_end_is_bad():
    assert metrics.worst("psnr", [30, 25, 40]) == (1, 25)
    assert metrics.worst("lpips", [0.1, 0.3, 0.2]) == (1, 0.3)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.lpips])
def test_shapes_must_match(clip, metric):
    with pytest.raises(VideoError, match=r"\[5, 32, 48, 3\], found \[4, 32, 48, 3\]"):
        metric(clip, clip[:4])
