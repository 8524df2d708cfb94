"""Transformer classes and pipelines of Diffusers that are not supported or tested, and why."""

from vidaccel.hosts.spec import HostSpec

_SOUND = "is for sound alone"
_UNET = "is a part of a UNet, whose blocks hand on streams of several sizes"

# Transformer class -> the model, and the reason why it is refused.
_REASONS = {
    "Transformer2DModel": ("transformers in UNets", _UNET),
    "TransformerTemporalModel": ("transformers along time in UNets", _UNET),
    "DreamLiteTransformer2DModel": ("DreamLite", _UNET),
    "OmniGenTransformer2DModel": (
        "OmniGen",
        "is a language model over text and pictures, with a key-value cache in its blocks",
    ),
    "PriorTransformer": (
        "priors of UnCLIP and Kandinsky 2",
        "makes an embedding, of a few tokens in a few steps",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        "SANA-WM refiner",
        "refines over a key-value cache in a few distilled steps, too few to reuse any",
    ),
    "AceStepTransformer1DModel": ("ACE-Step", _SOUND),
    "LongCatAudioDiTTransformer": ("LongCat-Audio", _SOUND),
    "MiniMaxMusic3Transformer1DModel": ("MiniMax-Music 3", _SOUND),
    "StableAudio3DiTModel": ("Stable Audio 3", _SOUND),
    "StableAudioDiTModel": ("Stable Audio Open", _SOUND),
    "T5FilmDecoder": ("Spectrogram Diffusion", _SOUND),
    "MiniMaxMusic3RVQDepthDecoder": (
        "depth decoder of MiniMax-Music 3",
        "writes tokens one after another and denoises nothing",
    ),
    "RFD4ProteinaTransformer": ("Proteina", "is for proteins"),
}

ROWS = tuple(
    HostSpec(name, (), family=family, since="", unsupported=reason)
    for name, (family, reason) in _REASONS.items()
)

_FEW = "is distilled to a few steps, too few to reuse any"

# Modular pipelines that no test runs.
UNTESTED = {
    "Cosmos3DistilledModularPipeline": _FEW,
    "EchoModularPipeline": "has no scheduler component: its steps are those of its blocks",
    "Flux2KleinModularPipeline": _FEW,
    "Flux3DistilledModularPipeline": _FEW,
    "HeliosPyramidDistilledModularPipeline": _FEW,
    "Krea2TurboModularPipeline": _FEW,
    "MiniMaxMusic3ModularPipeline": _SOUND,
    "QwenImage21TurboModularPipeline": _FEW,
    "StableDiffusionXLModularPipeline": "has a UNet, not a transformer",
    "WanAnimate2DistilledModularPipeline": _FEW,
}
