"""The training loop of assets/tiny-wan: resumable, with averaged weights and two optimizers.

Under torchrun each process computes the gradients of its share of a batch, and all take the same
step with their mean.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

MATRIX_RATE, VECTOR_RATE = 0.02, 1e-3  # of Muon and of AdamW
WARM_UP = 50
SAVE_EVERY, LOG_EVERY = 100, 20
NOT_MATRICES = ("embed", "shared", "relative_attention_bias", "proj_out", "time_proj", "outline")


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    workdir: Path,
    cycles: Sequence[int],
    *,
    ema_decay: float = 0.99,
    height: float = 1.0,
) -> None:
    """Minimise `loss_of(step)`; `model` ends with the averaged weights.

    The rate falls with the cosine over the steps of each cycle, and starts half as high in the next
    (warm restarts, Loshchilov and Hutter, 2017). `height` is that of the first.

    Writes `{name}.pt` every 100 steps, continues from it, and appends the loss to `{name}.jsonl`.
    """
    path, log = workdir / f"{name}.pt", workdir / f"{name}.jsonl"
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = build_optimizers(model)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    started, total = time.perf_counter(), 0.0
    heights = [
        height * 0.5**cycle * (0.01 + 0.5 * (1 + math.cos(math.pi * step / steps)))
        for cycle, steps in enumerate(cycles)
        for step in range(steps)
    ]
    for step in range(first, len(heights)):
        for optimizer, rate in zip(optimizers, (MATRIX_RATE, VECTOR_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / WARM_UP, heights[step])
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step)
        loss.backward()
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        total += loss.item()
        if share()[0]:
            continue  # the first process writes
        if (step + 1) % LOG_EVERY == 0:
            seconds = round(time.perf_counter() - started, 1)
            row = {"step": step + 1, "loss": round(total / LOG_EVERY, 5), "seconds": seconds}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            total = 0.0
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(heights):
            state = {
                "model": model.state_dict(),
                "ema": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
            }
            write(path, lambda p, s=state: torch.save(s, p))
    model.load_state_dict(average.state_dict())


def share() -> tuple[int, int]:
    """Which of how many processes this one is."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for weight matrices and convolutions, AdamW for the rest."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1
        named = any(word in name for word in NOT_MATRICES)
        (matrices if is_matrix and not named else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    return [Muon(matrices, lr=MATRIX_RATE), adamw]


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is orthogonalised (Jordan et al., 2024).

    Unlike torch.optim.Muon it takes convolutions, as matrices [out, in * kernel].
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = orthogonal(parameter.grad.lerp(average, group["momentum"]).flatten(1))
            rows, columns = update.shape
            scale = max(1.0, rows / columns) ** 0.5
            parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps. [m, n] -> [m, n]"""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).contiguous()


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Save to a neighbour first, so that an interrupted write leaves the old file whole."""
    partial = path.with_name(path.name + ".partial")
    save(partial)
    os.replace(partial, path)
