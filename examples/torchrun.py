"""One prompt on several GPUs: context parallelism, a step plan and the block cache together.

    torchrun --nproc-per-node 2 examples/torchrun.py

Every rank holds a part of the tokens. Plans need no communication; the block cache decides once for
all ranks. For a model of your own, replace the line with `from_pretrained`; its attention heads and
its tokens have to be divisible by the number of ranks.
"""

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanPipeline

import vidaccel
from vidaccel.environment import embedded_model
from vidaccel.video import write_video

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)

pipe = WanPipeline.from_pretrained(embedded_model()).to(device)
pipe.set_progress_bar_config(disable=rank > 0)
pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
pipe = vidaccel.accelerate(
    pipe, policy="every 2", cache=vidaccel.DBCache(threshold=0.1, corrector_blocks=1)
)

clip = pipe(
    "a cyan dotted square moving up on a maroon striped background",
    height=32,
    width=32,
    num_frames=9,
    num_inference_steps=20,
    generator=torch.Generator().manual_seed(0),
).frames[0]

if rank == 0:
    write_video("torchrun.mp4", clip)
    print(vidaccel.report(pipe))
dist.destroy_process_group()
