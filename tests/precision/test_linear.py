"""A layer in low precision: its result, and how it behaves as a module."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from vidaccel.errors import PrecisionError
from vidaccel.kernels.linear import token_haar
from vidaccel.precision.formats import FORMATS, dequantise, quantise, rounded, tensor_scale_of
from vidaccel.precision.linear import QuantisedLinear
from vidaccel.precision.rotations import hadamard, rotated
from vidaccel.precision.sequence import Sequence

Make = Callable[..., QuantisedLinear]


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rotation", [None, "hadamard"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_result_is_that_of_rounded_activations_and_weights(
    make: Make, name: str, rotation: str | None
):
    layer, form, x = make(format=name, rotation=rotation), FORMATS[name], randn(3, 5, 64)
    a, w, whole = x, layer.stock.weight, tensor_scale_of(x, form)
    if rotation is not None:
        a, w = rotated(a, hadamard(16)), rotated(w, hadamard(16))
        # Of a bound of the rotated activations: 16 entries of a quarter each.
        whole = None if form.scale != "e4m3" or form.floating else 4 * whole
    low = dequantise(quantise(a, form, tensor_scale=whole))
    expected = low @ rounded(w, form).mT + layer.stock.bias
    assert torch.allclose(layer(x), expected, rtol=1e-3, atol=1e-3)
    held = rounded(w, form)
    held = held if rotation is None else rotated(held, hadamard(16).mT)
    assert torch.allclose(layer.weight, held, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_of_the_type_of_the_activations(make: Make, dtype: torch.dtype):
    layer = make(nn.Linear(64, 48).to(dtype), format="int8")
    x = randn(5, 64).to(dtype)
    assert layer(x).dtype == dtype
    assert (layer(x) - layer.stock(x)).norm() < 0.03 * layer.stock(x).norm()


@pytest.mark.parametrize("shape", [(0, 64), (64,), (1, 64), (2, 3, 4, 64)])
def test_activations_may_be_of_any_leading_sizes(make: Make, shape: tuple[int, ...]):
    for name in ("int8", "nvint4"):
        layer = make(format=name)
        assert layer(randn(*shape)).shape == (*shape[:-1], 48)


def test_tokens_in_8_bits_are_better_than_those_in_4(make: Make):
    x = randn(1, 64, 64)
    four = make(format="nvint4", rotation=None)
    eight = make(format="nvint4", rotation=None, high_tokens=1.0)
    exact = x @ eight.weight.mT + eight.bias
    assert (eight(x) - exact).norm() < 0.15 * (four(x) - exact).norm()


@pytest.mark.parametrize("video_last", [False, True])
def test_video_tokens_are_mixed_and_text_is_in_8_bits_beside_them(make: Make, video_last: bool):
    grid, x = (2, 4, 4), randn(2, 40, 64)
    settings = {"format": "nvint4", "rotation": None, "sequence": "haar", "high_tokens": 4}
    layer = make(tokens=Sequence(video_last, grid), **settings)
    high = make(format="nvint4", rotation=None, high_tokens=1.0)
    low = make(format="nvint4", rotation=None)
    text, video = (x[:, :8], x[:, 8:]) if video_last else (x[:, 32:], x[:, :32])
    mixed = token_haar(video.contiguous(), grid)
    parts = [high(mixed[:, :4]), low(mixed[:, 4:])]
    expected = token_haar(torch.cat(parts, 1) - layer.bias, grid, inverse=True) + layer.bias
    expected = [high(text), expected] if video_last else [expected, high(text)]
    # Apart from the scale of the tensor, which is that of all of it.
    assert (layer(x) - torch.cat(expected, 1)).norm() < 0.05 * layer(x).norm()


def test_what_holds_no_whole_video_is_in_8_bits(make: Make):
    settings = {"format": "nvint4", "rotation": None}
    layer = make(tokens=Sequence(grid=(2, 4, 4)), sequence="haar", high_tokens=4, **settings)
    high = make(high_tokens=1.0, **settings)
    for shape in ((1, 31, 64), (3, 64)):
        assert torch.equal(layer(randn(*shape)), high(randn(*shape)))


def test_the_weight_can_be_read_and_not_written(make: Make):
    layer = make(format="int8")
    assert (layer.weight - layer.stock.weight).norm() < 0.01 * layer.stock.weight.norm()
    assert (layer.weight.data.clone() * 2).shape == (48, 64)
    assert type(layer.weight * 2) is torch.Tensor
    for write in (
        lambda: layer.weight.add_(1),
        lambda: layer.weight.data.copy_(torch.zeros(48, 64)),
        lambda: layer.weight.__setitem__(0, 0.0),
        lambda: setattr(layer.weight, "data", torch.zeros(48, 64)),
    ):
        with pytest.raises(PrecisionError, match="restore"):
            write()
    with pytest.raises(PrecisionError, match="fuse_lora"):
        layer.weight.data += 1


def test_codes_and_scales_keep_their_types_and_follow_the_model(make: Make):
    for name in ("int8", "nvint4", "mxfp8"):
        layer = make(format=name)
        before = {key: (buffer.dtype, buffer.clone()) for key, buffer in layer.named_buffers()}
        model = nn.Sequential(layer).to(torch.float16)
        for key, buffer in layer.named_buffers():
            assert buffer.dtype == before[key][0]
            assert torch.equal(buffer.float(), before[key][1].float())
        assert layer.bias.dtype == torch.float16
        assert model(randn(3, 64).half()).dtype == torch.float16


def test_the_state_dict_is_that_of_the_stock_layer(make: Make):
    stock = nn.Linear(64, 48)
    exact = copy.deepcopy(stock.state_dict())
    layer = make(stock, format="int8", keep_weights="disk")
    layer.put_in_place()
    found = layer.state_dict()
    assert list(found) == list(exact)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    with pytest.raises(PrecisionError, match="restore"):
        layer.load_state_dict(exact)
    layer.load_state_dict({}, strict=False)  # as adapters around it are loaded


def test_hooks_of_the_stock_layer_are_hooks_of_this_one(make: Make):
    stock, seen = nn.Linear(64, 48), []
    before = stock.register_forward_hook(lambda *_: seen.append("before"))
    layer = make(stock, format="int8")
    layer.register_forward_pre_hook(lambda *_: seen.append("after"))
    layer(randn(1, 64))
    assert seen == ["after", "before"]
    before.remove()
    layer(randn(1, 64))
    assert seen == ["after", "before", "after"]


def test_it_is_a_linear_layer_to_all_who_look(make: Make):
    layer = make(format="int8")
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 48)
    assert "int8" in repr(layer)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert layer.bytes_held < 0.35 * layer.stock.weight.nbytes
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(48, 64))


def test_what_is_not_finite_comes_out_again(make: Make):
    x = randn(3, 64)
    x[1, 2] = torch.nan
    for name in ("int8", "nvint4", "mxint8"):
        out = make(format=name)(x)
        assert out[1].isnan().any()
        if FORMATS[name].scale != "e4m3":
            assert out[[0, 2]].isfinite().all()


def test_a_compiled_layer_is_one_graph_of_the_same_result(make: Make):
    torch._dynamo.reset()
    for settings in ({"format": "int8"}, {"format": "nvint4"}, {"format": "mxfp8"}):
        layer = make(**settings)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        x = randn(4, 64)
        assert torch.equal(compiled(x), layer(x))


def test_the_transform_lowers_the_error_of_smooth_video(make: Make):
    """Tokens that change slowly over frames, height and width: STaMP is made for these."""
    grid = (4, 4, 4)
    smooth = randn(1, 1, 64) * 3 + 0.3 * randn(1, 64, 64, seed=2)
    settings = {"format": "nvint4", "rotation": None}
    mixed = make(tokens=Sequence(grid=grid), sequence="haar", high_tokens=4, **settings)
    plain = make(**settings)
    exact = smooth @ plain.weight.mT + plain.bias
    assert (mixed(smooth) - exact).norm() < 0.5 * (plain(smooth) - exact).norm()
