"""Train assets/tiny-wan, the text-to-video model embedded in this project, on a CPU.

    torchrun --nproc-per-node 2 assets/training/train.py all     # a process per core, every stage
    python assets/training/train.py vae --vae-steps 1560         # or one process, one stage

Stages: `vae` (autoencoder on rendered clips), `encode` (cache of normalised latents), `transformer`
(flow matching, together with the text encoder), `decoder` (a wider one, for the same latents) and
`export` (Diffusers folder). Each stage goes on from its last checkpoint in the work directory.
`assets/training/evaluate.py` measures the result.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from fit import fit, share, write
from parts import (
    DECODER_WIDTH,
    PROMPT_TOKENS,
    SIZES,
    TRAIN_SCENES,
    Denoiser,
    build_tokenizer,
    build_transformer,
    build_vae,
    coverage,
    draw_scenes,
    render,
    render_batch,
    to_tensor,
    widen,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SEED = 20
VAE_BATCH = {"small": 2, "large": 2}
BATCH = {"small": 16, "large": 2}
CACHE = {"small": 16384, "large": 1280}  # clips
SHARD = 256
ENCODED = 16  # clips at once
STATISTICS = 4  # batches of each size that the mean and deviation of latents are taken from
CHANGE_WEIGHT = 8.0
OUTLINE_WEIGHT = 10.0
COVERAGE_WEIGHT = 1.0
LARGE = {0: 0, 2520: 3, 4200: 2}  # from a step on, every so-manyth one is of large clips
EMPTY_PROMPTS = 0.1
TRAIN_SHIFT = 3.0  # more noise levels near pure noise, where the layout is decided
SAMPLE_SHIFT = 1.0  # evenly spaced noise levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    stages = ["vae", "encode", "transformer", "decoder", "export", "all"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--workdir", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "tiny-wan")
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[4200, 3300], help="of the transformer, by cycle"
    )
    parser.add_argument(
        "--decoder-steps", type=int, nargs="+", default=[3000, 1500], help="by cycle"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    processes = share()[1]
    if any(count % processes for count in (*VAE_BATCH.values(), *BATCH.values())):
        parser.error(f"{processes} processes do not divide the batches {VAE_BATCH} and {BATCH}")
    args.workdir.mkdir(parents=True, exist_ok=True)
    if args.stage in ("vae", "all"):
        train_vae(args.workdir, args.vae_steps)
    if args.stage in ("encode", "all"):
        encode(args.workdir)
    if args.stage in ("transformer", "all"):
        train_transformer(args.workdir, args.steps)
    if args.stage in ("decoder", "all"):
        train_decoder(args.workdir, args.decoder_steps)
    if args.stage in ("export", "all") and share()[0] == 0:
        export(args.workdir, args.output)


# -------------------------------------------------------------------------------------- stages


def train_vae(workdir: Path, steps: int) -> None:
    """Squared error with a slight KL term; every third step is of large clips."""
    torch.manual_seed(SEED)
    vae = build_vae()
    rank, processes = share()

    def loss_of(step: int) -> Tensor:
        size = "large" if step % 3 == 2 else "small"
        count = VAE_BATCH[size] // processes
        clips = render_batch(TRAIN_SCENES, (SEED, 0, step, rank), size, count)
        torch.manual_seed(step * processes + rank)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            error = decode_unclamped(vae, posterior.sample()).float() - clips
        kl = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        return error.square().mean() + 1e-5 * kl

    fit("vae", vae, loss_of, workdir, [steps])
    if rank == 0:
        save_vae(vae, workdir)
    wait()


def save_vae(vae: AutoencoderKLWan, workdir: Path) -> None:
    """Save an autoencoder with the mean and deviation of its latents."""
    vae.eval()
    with torch.no_grad():
        latents = [
            vae.encode(render_batch(TRAIN_SCENES, (SEED, 1, i), size, ENCODED)).latent_dist.mean
            for size in SIZES
            for i in range(STATISTICS)
        ]
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in latents], dim=1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
    vae.save_pretrained(workdir / "vae")


def encode(workdir: Path) -> None:
    """Write shards of normalised latents, fp16, what the object covers, uint8, and captions."""
    rank, processes = share()
    vae = AutoencoderKLWan.from_pretrained(workdir / "vae").eval()
    mean = torch.tensor(vae.config.latents_mean)[:, None, None, None]
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    for size, clips in CACHE.items():
        for shard in range(rank, clips // SHARD, processes):
            path = shard_path(workdir, size, shard)
            if path.exists():
                continue
            drawn = draw_scenes(TRAIN_SCENES, (SEED, 2, shard), SHARD)
            rng = np.random.default_rng((SEED, 3, shard))
            videos = [render(s, rng, size) for s in drawn]
            latents = []
            for i in range(0, SHARD, ENCODED):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    video = to_tensor(videos[i : i + ENCODED])
                    latents.append(vae.encode(video).latent_dist.mean.float())
            tensors = {
                "latents": ((torch.cat(latents) - mean) / std).half(),
                "coverage": torch.stack([coverage(*x) for x in zip(drawn, videos, strict=True)]),
            }
            path.parent.mkdir(exist_ok=True)
            captions = json.dumps([s.caption for s in drawn])
            write(path, lambda p, t=tensors, c=captions: save_file(t, p, {"captions": c}))
    wait()


def train_transformer(workdir: Path, cycles: list[int]) -> None:
    """Flow matching, mostly at high noise: small clips first, later both sizes."""
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = Denoiser(len(tokenizer))
    model.transformer.compile_repeated_blocks()  # a third faster; needs a C++ compiler
    data = {size: load_shards(workdir, size) for size in SIZES}
    outline_of = outline_probe(*data["small"][:2])
    rank, processes = share()

    def loss_of(step: int) -> Tensor:
        every = max((start, every) for start, every in LARGE.items() if start <= step)[1]
        size = "large" if every and step % every == 0 else "small"
        latents, coverages, captions = data[size]
        rng = np.random.default_rng((SEED, 4, step))
        mine = slice(rank, None, processes)
        picked = rng.integers(len(captions), size=BATCH[size])[mine]
        dropped = (rng.random(BATCH[size]) < EMPTY_PROMPTS)[mine]
        prompts = ["" if d else captions[i] for i, d in zip(picked, dropped, strict=True)]
        text = tokenizer(
            prompts, padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt"
        )
        clean = latents[torch.from_numpy(picked)].float()
        covered = coverages[torch.from_numpy(picked)].float() / 255
        torch.manual_seed(step * processes + rank)
        noise = torch.randn_like(clean)
        uniform = torch.arange(BATCH[size])[mine] + torch.rand(len(clean))
        uniform /= BATCH[size]
        sigma = TRAIN_SHIFT * uniform / (1 + (TRAIN_SHIFT - 1) * uniform)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity, logits = model(noisy, 1000 * sigma, text.input_ids, text.attention_mask)
        error = velocity.float() - (noise - clean)
        # Both have the same optimum as the error itself. The first is without the static
        # background, whose random phase hides the motion; the second looks at what tells the
        # outline, which is a small part of the latents beside the textures.
        change = F.avg_pool3d(error.diff(dim=2), (1, 2, 2))
        outline = torch.einsum("bcfhw,oc->bofhw", error, outline_of)
        # What the object covers, read from the middle of the network, which so learns it sooner.
        seen = F.binary_cross_entropy_with_logits(logits.float(), covered)
        return (
            error.square().mean()
            + CHANGE_WEIGHT * change.square().mean()
            + OUTLINE_WEIGHT * outline.square().mean()
            + COVERAGE_WEIGHT * seen
        )

    fit("transformer", model, loss_of, workdir, cycles, ema_decay=0.998)


def train_decoder(workdir: Path, cycles: list[int]) -> None:
    """A wider decoder for the encoder as it is, so that the latents stay what they were."""
    torch.manual_seed(SEED)
    narrow = AutoencoderKLWan.from_pretrained(workdir / "vae").eval()
    vae = build_vae(DECODER_WIDTH)
    statistics = {key: narrow.config[key] for key in ("latents_mean", "latents_std")}
    vae.register_to_config(**statistics)
    for part in ("encoder", "quant_conv", "post_quant_conv"):
        getattr(vae, part).load_state_dict(getattr(narrow, part).state_dict())
    widen(narrow.decoder, vae.decoder)
    vae.encoder.requires_grad_(False)
    rank, processes = share()

    def loss_of(step: int) -> Tensor:
        size = "small" if step % 4 == 3 else "large"
        count = VAE_BATCH[size] // processes
        clips = render_batch(TRAIN_SCENES, (SEED, 5, step, rank), size, count)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(clips).latent_dist.mean
            error = decode_unclamped(vae, latents).float() - clips
        return error.square().mean()

    decoder = nn.ModuleDict({"post_quant": vae.post_quant_conv, "decoder": vae.decoder})
    fit("decoder", decoder, loss_of, workdir, cycles, height=0.5)
    if rank == 0:
        vae.eval().save_pretrained(workdir / "wide-vae")
    wait()


def export(workdir: Path, output: Path) -> None:
    """Assemble the pipeline from the latest checkpoints (EMA weights) and save it."""
    tokenizer = build_tokenizer()
    model = Denoiser(len(tokenizer))
    state = torch.load(workdir / "transformer.pt", weights_only=True)
    model.load_state_dict(state["ema"])
    transformer = build_transformer()
    transformer.load_state_dict(model.transformer.state_dict())
    # from_pretrained would write this machine's path into the configuration.
    folder = workdir / "wide-vae"
    vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
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


def load_shards(workdir: Path, size: str) -> tuple[Tensor, Tensor, list[str]]:
    """Latents [N, C, F, H, W], coverage [N, OUTLINE, F, H, W] and captions of a size."""
    latents, coverages, captions = [], [], []
    for shard in range(CACHE[size] // SHARD):
        path = shard_path(workdir, size, shard)
        tensors = load_file(path)
        latents.append(tensors["latents"])
        coverages.append(tensors["coverage"])
        with safe_open(path, "pt") as file:
            captions += json.loads(file.metadata()["captions"])
    return torch.cat(latents), torch.cat(coverages), captions


def outline_probe(latents: Tensor, coverages: Tensor, clips: int = 1024) -> Tensor:
    """Least squares from the latents of a token to what the object covers of it: [OUTLINE, C]."""
    x = latents[:clips].float().transpose(0, 1).flatten(1).T
    y = coverages[:clips].float().transpose(0, 1).flatten(1).T / 255
    return torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution.T.contiguous()


def wait() -> None:
    """Until every process has come so far."""
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
