"""Train assets/tiny-wan, the text-to-video model embedded in this project, on a CPU.

    python assets/training/train.py all                      # every stage, in order
    python assets/training/train.py vae --vae-steps 1560    # or one at a time

Stages: `vae` (autoencoder on rendered clips), `encode` (cache of normalised latents), `transformer`
(flow matching, together with the text encoder) and `export` (Diffusers folder). Each stage goes on
from its last checkpoint in the work directory. `assets/training/evaluate.py` measures the result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from fit import fit, write
from parts import (
    PROMPT_TOKENS,
    SIZES,
    TRAIN_SCENES,
    Denoiser,
    build_tokenizer,
    build_transformer,
    build_vae,
    draw_scenes,
    render,
    render_batch,
    to_tensor,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SEED = 20
VAE_BATCH = {"small": 4, "large": 1}
VAE_FIRST_FRAMES = 5  # of small clips, until VAE_FULL_LENGTH of the steps
VAE_FULL_LENGTH = 0.6
BATCH = {"small": 16, "large": 2}
CACHE = {"small": 8192, "large": 1280}  # clips
SHARD = 256
CHANGE_WEIGHT = 8.0
LARGE_FROM = 0.6  # of the steps: every third one is of large clips from there on
EMPTY_PROMPTS = 0.1
TRAIN_SHIFT = 3.0  # more noise levels near pure noise, where the layout is decided
SAMPLE_SHIFT = 1.0  # evenly spaced noise levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("stage", choices=["vae", "encode", "transformer", "export", "all"])
    parser.add_argument("--workdir", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "tiny-wan")
    parser.add_argument("--vae-steps", type=int, default=1560)
    parser.add_argument("--steps", type=int, default=2050, help="of the transformer")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.workdir.mkdir(parents=True, exist_ok=True)
    if args.stage in ("vae", "all"):
        train_vae(args.workdir, args.vae_steps)
    if args.stage in ("encode", "all"):
        encode(args.workdir)
    if args.stage in ("transformer", "all"):
        train_transformer(args.workdir, args.steps)
    if args.stage in ("export", "all"):
        export(args.workdir, args.output)


# -------------------------------------------------------------------------------------- stages


def train_vae(workdir: Path, steps: int) -> None:
    """MSE + L1 with a slight KL term: short clips first, then whole clips of both sizes."""
    torch.manual_seed(SEED)
    vae = build_vae()

    def loss_of(step: int) -> Tensor:
        whole = step >= VAE_FULL_LENGTH * steps
        size = "large" if whole and step % 2 else "small"
        clips = render_batch(TRAIN_SCENES, (SEED, 0, step), size, VAE_BATCH[size])
        if not whole:
            clips = clips[:, :, :VAE_FIRST_FRAMES].contiguous()
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            error = decode_unclamped(vae, posterior.sample()).float() - clips
        kl = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-5 * kl

    fit("vae", vae, loss_of, workdir, steps)
    vae.eval()
    with torch.no_grad():
        latents = [
            vae.encode(render_batch(TRAIN_SCENES, (SEED, 1, i), size, 16)).latent_dist.mean
            for size in SIZES
            for i in range(4)
        ]
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in latents], dim=1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
    vae.save_pretrained(workdir / "vae")


def encode(workdir: Path) -> None:
    """Write shards of normalised latents, fp16, and their captions."""
    vae = AutoencoderKLWan.from_pretrained(workdir / "vae").eval()
    mean = torch.tensor(vae.config.latents_mean)[:, None, None, None]
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    for size, clips in CACHE.items():
        for shard in range(clips // SHARD):
            path = shard_path(workdir, size, shard)
            if path.exists():
                continue
            drawn = draw_scenes(TRAIN_SCENES, (SEED, 2, shard), SHARD)
            rng = np.random.default_rng((SEED, 3, shard))
            latents = []
            for i in range(0, SHARD, 16):
                video = to_tensor([render(s, rng, size) for s in drawn[i : i + 16]])
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    latents.append(vae.encode(video).latent_dist.mean.float())
            tensors = {"latents": ((torch.cat(latents) - mean) / std).half()}
            path.parent.mkdir(exist_ok=True)
            captions = json.dumps([s.caption for s in drawn])
            write(path, lambda p, t=tensors, c=captions: save_file(t, p, {"captions": c}))


def train_transformer(workdir: Path, steps: int) -> None:
    """Flow matching, mostly at high noise: small clips first, later both sizes."""
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = Denoiser(len(tokenizer))
    data = {size: load_latents(workdir, size) for size in SIZES}

    def loss_of(step: int) -> Tensor:
        size = "large" if step >= LARGE_FROM * steps and step % 3 == 0 else "small"
        latents, captions = data[size]
        rng = np.random.default_rng((SEED, 4, step))
        picked = rng.integers(len(captions), size=BATCH[size])
        dropped = rng.random(BATCH[size]) < EMPTY_PROMPTS
        prompts = ["" if d else captions[i] for i, d in zip(picked, dropped, strict=True)]
        text = tokenizer(
            prompts, padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt"
        )
        clean = latents[torch.from_numpy(picked)].float()
        torch.manual_seed(step)
        noise = torch.randn_like(clean)
        uniform = (torch.arange(len(clean)) + torch.rand(len(clean))) / len(clean)
        sigma = TRAIN_SHIFT * uniform / (1 + (TRAIN_SHIFT - 1) * uniform)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(noisy, 1000 * sigma, text.input_ids, text.attention_mask)
        error = velocity.float() - (noise - clean)
        # The same optimum, but without the static background, whose random phase hides the motion.
        change = F.avg_pool3d(error.diff(dim=2), (1, 2, 2))
        return error.square().mean() + CHANGE_WEIGHT * change.square().mean()

    fit("transformer", model, loss_of, workdir, steps, ema_decay=0.998)


def export(workdir: Path, output: Path) -> None:
    """Assemble the pipeline from the latest checkpoints (EMA weights) and save it."""
    tokenizer = build_tokenizer()
    model = Denoiser(len(tokenizer))
    state = torch.load(workdir / "transformer.pt", weights_only=True)
    model.load_state_dict(state["ema"])
    transformer = build_transformer()
    transformer.load_state_dict(model.transformer.state_dict())
    # from_pretrained would write this machine's path into the configuration.
    vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(workdir / "vae"))
    vae.load_state_dict(load_file(workdir / "vae" / "diffusion_pytorch_model.safetensors"))
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder.eval(),
        vae=vae.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SAMPLE_SHIFT),
        transformer=transformer.half(),
    ).save_pretrained(output)
    # Transformers 5 writes a class name of its own; both 4 and 5 read this one.
    for path in (output / "model_index.json", output / "tokenizer" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


# ------------------------------------------------------------------------------------- helpers


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode` before its clamp, which has no gradient. -> [B, 3, F, H, W]"""
    chunks: list[Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda _module, _args, out: chunks.append(out))
    vae.decode(latents)
    hook.remove()
    return unpatchify(torch.cat(chunks, dim=2), vae.config.patch_size)


def shard_path(workdir: Path, size: str, shard: int) -> Path:
    return workdir / "latents" / f"{size}-{shard:03}.safetensors"


def load_latents(workdir: Path, size: str) -> tuple[Tensor, list[str]]:
    """All cached latents of one size [N, C, F, H, W] and their captions."""
    latents, captions = [], []
    for shard in range(CACHE[size] // SHARD):
        path = shard_path(workdir, size, shard)
        latents.append(load_file(path)["latents"])
        with safe_open(path, "pt") as file:
            captions += json.loads(file.metadata()["captions"])
    return torch.cat(latents), captions


if __name__ == "__main__":
    main()
