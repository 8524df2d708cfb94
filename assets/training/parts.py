"""The parts of assets/tiny-wan: networks, tokenizer and rendered batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidaccel.clips import scenes

SIZES = {"small": (9, 64, 64), "large": (17, 96, 96)}  # frames, height, width
LATENT_CHANNELS = 32
WIDTH, DECODER_WIDTH = 48, 96  # channels of the autoencoder, and of its decoder at last
HEAD_DIM = 32
OUTLINE = 16  # shares of a token's 2x2 squares of pixels that the named object covers
OUTLINE_BLOCK = 5  # whose output they are read from in training
MEAN_PIXEL = -0.65  # of the clips, in -1..1
PROMPT_TOKENS = 16  # the longest caption and its end token are 12
PIPELINE_TOKENS = 512  # WanPipeline pads prompts with zeros to this length

TRAIN_SCENES = [s for s in scenes.all_scenes() if not scenes.is_held_out(s.caption)]
HELD_OUT_SCENES = [s for s in scenes.all_scenes() if scenes.is_held_out(s.caption)]


def build_vae(decoder_width: int = WIDTH) -> AutoencoderKLWan:
    """8x8x2 compression: 4x4 pixel unshuffle, then one spatio-temporal downsampling."""
    vae = AutoencoderKLWan(
        base_dim=WIDTH,
        decoder_base_dim=decoder_width,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_spatial=8,
        scale_factor_temporal=2,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    initialise(vae)
    return vae


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
    """Let the signal through from the first step: the default start takes many times longer.

    Every convolution begins close to an orthogonal map of its centre tap (the current frame, as
    time is causal), residual branches close to zero, and the mean of the clips is taken off first.
    """
    for name, conv in vae.named_modules():
        if isinstance(conv, (nn.Conv2d, nn.Conv3d)):
            branch = "conv2" in name or "attentions" in name
            map_ = nn.init.orthogonal_(torch.empty(conv.weight.shape[:2]))
            taps = conv.weight.mul_(0.5).flatten(2)
            centre = taps.shape[2] - 1 - math.prod(conv.kernel_size[-2:]) // 2
            taps[..., centre] += 0.1 * map_ if branch else map_
            conv.bias.zero_()
    entry = vae.encoder.conv_in
    entry.bias.copy_(-MEAN_PIXEL * entry.weight.flatten(1).sum(1))
    vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1  # the log variances: nearly noiseless
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0


@torch.no_grad()
def widen(narrow: nn.Module, wide: nn.Module) -> None:
    """Let a wider decoder begin close to what a narrow one computes.

    Its first channels are those of the narrow one; the others start small, and so do the weights
    that lead to them and from them.
    """
    sources = dict(narrow.named_parameters())
    for name, parameter in wide.named_parameters():
        source = sources[name]
        if parameter.shape == source.shape:
            parameter.copy_(source)
            continue
        if name.endswith("gamma"):
            # Norms are of the root mean square over all channels, most of which are now small.
            source = source * (len(source) / len(parameter)) ** 0.5
        elif parameter.ndim > 1:
            parameter.mul_(0.05)
        stacks = max(1, len(source) // WIDTH)  # query, key and value; two frames of one
        corner = source.unflatten(0, (stacks, -1))
        parameter.unflatten(0, (stacks, -1))[tuple(map(slice, corner.shape))] = corner


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per lower-case word; </s> is appended."""
    words = sorted({word for scene in scenes.all_scenes() for word in scene.caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=PIPELINE_TOKENS,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        freq_dim=128,
        ffn_dim=448,
        num_layers=10,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


class Denoiser(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocab_size)
        self.transformer = build_transformer()
        self.pads = MergedPads()
        for block in self.transformer.blocks:
            block.attn1.set_processor(Plain())
            block.attn2.set_processor(self.pads)
        width = self.transformer.config.num_attention_heads * HEAD_DIM
        self.outline = nn.Linear(width, OUTLINE)
        self.transformer.blocks[OUTLINE_BLOCK].register_forward_hook(self._keep)

    def _keep(self, _block: nn.Module, _args: Any, hidden: Tensor) -> None:
        self.hidden = hidden

    def forward(
        self, latents: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """latents [B, C, F, H, W], timestep [B], ids and mask [B, PROMPT_TOKENS].

        Returns the velocity [B, C, F, H, W] and logits of what the named object covers of each
        token [B, OUTLINE, F, H, W].
        """
        text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        self.pads.count(mask)
        velocity = self.transformer(latents, timestep, text, return_dict=False)[0]
        covered = self.outline(self.hidden).transpose(1, 2)
        return velocity, covered.unflatten(2, latents.shape[2:])


class Plain:
    """Attention by matrix products: on a CPU, torch's fused one takes twice as long to train."""

    bias: Tensor | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden: Tensor,
        text: Tensor | None = None,
        _mask: None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        source = hidden if text is None else text
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary is not None:
            q, k = rotated(q, *rotary), rotated(k, *rotary)
        q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        return attn.to_out[0]((logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


class MergedPads(Plain):
    """Cross-attention over PROMPT_TOKENS keys that equals the pipeline's PIPELINE_TOKENS keys.

    The pipeline pads prompts with zero vectors and does not mask them, so all pads share one key
    and value: k pads that stand for n are the same softmax once log(n / k) is added to each logit.
    """

    def count(self, mask: Tensor) -> None:
        words = mask.sum(dim=1, keepdim=True)
        stands_for = (PIPELINE_TOKENS - words) / (PROMPT_TOKENS - words)
        self.bias = torch.where(mask.bool(), 0.0, stands_for.log())[:, None, None]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channels, as WanTransformer3DModel lays them out."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def draw_scenes(pool: list[scenes.Scene], seed: tuple[int, ...], count: int) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [pool[i] for i in rng.integers(len(pool), size=count)]


def render(scene: scenes.Scene, rng: np.random.Generator, size: str) -> scenes.Array:
    frames, height, width = SIZES[size]
    return scenes.render(scene, rng, frames=frames, height=height, width=width)


def render_batch(pool: list[scenes.Scene], seed: tuple[int, ...], size: str, count: int) -> Tensor:
    """Random scenes of a pool as the VAE takes them: [count, 3, F, H, W] in -1..1."""
    rng = np.random.default_rng(seed)
    return to_tensor([render(s, rng, size) for s in draw_scenes(pool, seed, count)])


def coverage(scene: scenes.Scene, video: scenes.Array) -> Tensor:
    """How much of each token's squares the named object covers: uint8 [OUTLINE, f, h, w].

    A token is 8x8 pixels of two frames; the first latent frame is of the first frame alone.
    """
    mask = torch.from_numpy(scenes.object_mask(video, scene.color)).float()
    squares = F.avg_pool3d(torch.cat([mask[:1], mask])[None], 2)
    return (255 * F.pixel_unshuffle(squares.transpose(0, 1), 4)).transpose(0, 1).byte()


def to_tensor(videos: list[scenes.Array]) -> Tensor:
    """[F, H, W, 3] in 0..1 each -> [B, 3, F, H, W] in -1..1"""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1
