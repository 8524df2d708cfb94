"""The supported image transformer classes, which are built like the video ones, a row each."""

from vidaccel.hosts.spec import BlockList, Head, HostSpec

_JOINT = ("hidden_states", "encoder_hidden_states")
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_ONE_FRAME = "a single frame"

ROWS = (
    HostSpec(
        "FluxTransformer2DModel",
        ("FluxPipeline",),
        (
            BlockList("transformer_blocks", _TEXT_FIRST),
            BlockList("single_transformer_blocks", _TEXT_FIRST),
        ),
        family="FLUX.1",
        guidance="embedded",
        tokens=("text", "image"),
        attention=None,
        attention_note=_ONE_FRAME,
        threshold=0.08,
        threshold_origin="cache-dit's FLUX.1 benchmark, 1 probe block",
        times=("t / 1000",),
    ),
    HostSpec(
        "Flux2Transformer2DModel",
        ("Flux2Pipeline",),
        (
            BlockList("transformer_blocks", _TEXT_FIRST),
            BlockList("single_transformer_blocks", joins=_TEXT_FIRST),
        ),
        (Head("norm_out", tail=True),),
        family="FLUX.2",
        guidance="embedded",
        tokens=("text", "image"),
        attention=None,
        attention_note=_ONE_FRAME,
        times=("t / 1000",),
    ),
    HostSpec(
        "ChromaTransformer2DModel",
        ("ChromaPipeline",),
        (
            BlockList("transformer_blocks", _TEXT_FIRST),
            BlockList("single_transformer_blocks", joins=_TEXT_FIRST),
        ),
        family="Chroma",
        tokens=("text", "image"),
        attention=None,
        attention_note=_ONE_FRAME,
        times=("t / 1000",),
    ),
    HostSpec(
        "SD3Transformer2DModel",
        ("StableDiffusion3Pipeline",),
        (BlockList("transformer_blocks", _TEXT_FIRST),),
        family="Stable Diffusion 3",
        guidance="batched",
        tokens=("image", "text"),
        attention=None,
        attention_note=_ONE_FRAME,
    ),
    HostSpec(
        "QwenImageTransformer2DModel",
        ("QwenImagePipeline",),
        (BlockList("transformer_blocks", _TEXT_FIRST),),
        family="Qwen-Image",
        tokens=("text", "image"),
        attention=None,
        attention_note=_ONE_FRAME,
        times=("t / 1000",),
    ),
    HostSpec(
        "HunyuanImageTransformer2DModel",
        ("HunyuanImagePipeline",),
        (
            BlockList("transformer_blocks", _JOINT),
            BlockList("single_transformer_blocks", _JOINT),
        ),
        family="HunyuanImage 2.1",
        tokens=("image", "text"),
        attention=None,
        attention_note=_ONE_FRAME,
    ),
    HostSpec(
        "CogView4Transformer2DModel",
        ("CogView4Pipeline",),
        (BlockList("transformer_blocks", _JOINT),),
        family="CogView4",
        tokens=("text", "image"),
        attention=None,
        attention_note=_ONE_FRAME,
    ),
    HostSpec(
        "ZImageTransformer2DModel",
        ("ZImagePipeline",),
        (BlockList("layers", ("x",)),),
        (),
        family="Z-Image",
        guidance="batched",
        tokens=("image", "text"),
        attention=None,
        attention_note=_ONE_FRAME,
        main="x",
        sample="x",
        timestep="t",
        times=("1 - t / 1000",),
    ),
)
