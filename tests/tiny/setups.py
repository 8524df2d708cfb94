"""What people do to a pipeline besides accelerating it."""

from typing import Any

import torch


def compiled(pipe: Any) -> None:
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    """The hooks of enable_sequential_cpu_offload, which fails on a CPU: it moves buffers too."""
    from accelerate import cpu_offload

    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            cpu_offload(module, torch.device("cpu"), offload_buffers=False)


def block_offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def leaf_offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )


def casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def tiling(pipe: Any) -> None:
    pipe.vae.enable_tiling()


def lora(pipe: Any, name: str = "default", seed: int = 0) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)
