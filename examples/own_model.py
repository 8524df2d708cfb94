"""A transformer that vidaccel does not know, added with one row.

    python examples/own_model.py

The row says where the blocks are, what they return, and which module reads the last one's result.
The model here is random and small; nothing is downloaded.
"""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

import vidaccel


class Block(nn.Linear):
    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return tokens + torch.tanh(super().forward(tokens) + time)


class MyTransformer(nn.Module):
    def __init__(self, width: int = 64, depth: int = 12) -> None:
        super().__init__()
        self.config = {"width": width, "depth": depth}
        self.embed, self.head = nn.Linear(16, width), nn.Linear(width, 16)
        self.layers = nn.ModuleList(Block(width, width) for _ in range(depth))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(latents)
        for layer in self.layers:
            tokens = layer(tokens, timestep.view(-1, 1, 1) / 1000)
        return self.head(tokens)


class MyPipeline(DiffusionPipeline):
    def __init__(self, transformer: MyTransformer, scheduler: object) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps: int = 30) -> torch.Tensor:
        latents = torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.transformer(latents, t), t, latents).prev_sample
        return latents


blocks = (vidaccel.BlockList("layers", returns=("tokens",)),)
heads = (vidaccel.Head("head", streams=("tokens",)),)
vidaccel.register_host(
    vidaccel.HostSpec("MyTransformer", (), blocks, heads, main="tokens", sample="latents")
)
pipe = MyPipeline(MyTransformer().eval(), FlowMatchEulerDiscreteScheduler())
plain = pipe()
vidaccel.accelerate(pipe, policy="every 3")
error = (pipe() - plain).norm() / plain.norm()
print(vidaccel.report(pipe))
print(f"relative error of the result: {error:.2%}")
