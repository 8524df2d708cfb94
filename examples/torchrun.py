"""One clip on several processes: Diffusers spreads the tokens, vidaccel skips steps on all alike.

    torchrun --nproc-per-node 4 examples/torchrun.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

Without a GPU the processes share the CPU, which is only good for trying it:

    torchrun --nproc-per-node 2 examples/torchrun.py --size 64 --frames 9 --steps 10
"""

import argparse

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.utils import export_to_video

import vidaccel
from vidaccel.clips.embedded import EMBEDDED_PROMPT
from vidaccel.clips.load import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="folder or hub id; the embedded model if left out")
    parser.add_argument("--prompt", default=EMBEDDED_PROMPT)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="out-torchrun.mp4")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if not gpu:
        torch.set_num_threads(1)
        torch.accelerator.device_count = lambda: world  # Diffusers divides by it
    device = f"cuda:{rank % torch.cuda.device_count()}" if gpu else "cpu"

    pipe = load_pipeline(options.model, device=device)
    pipe.set_progress_bar_config(disable=rank > 0)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    vidaccel.accelerate(pipe, cache=vidaccel.DBCache())  # before or after, either way

    frames = pipe(
        options.prompt,
        height=options.size,
        width=options.size,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        generator=torch.Generator("cpu").manual_seed(0),
    ).frames[0]
    if rank == 0:
        print(vidaccel.report(pipe))
        export_to_video(frames, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
