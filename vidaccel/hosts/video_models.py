"""The supported video transformer classes, a row of data each.

A row says where the transformer's blocks are, what they return, and which module reads the result
after the last block. The engine needs nothing else to know about a model.
"""

from vidaccel.hosts.spec import BlockList, Head, HostSpec

# Blocks of joint attention return both of their streams.
_JOINT = ("hidden_states", "encoder_hidden_states")
_DEMO = "cache-dit's demo video, {} probe blocks"

_WAN = (
    HostSpec(
        "WanTransformer3DModel",
        (
            "WanPipeline",
            "WanImageToVideoPipeline",
            "WanVideoToVideoPipeline",
            "LucyEditPipeline",
            "WanModularPipeline",
            "Wan22ModularPipeline",
            "Wan22Image2VideoModularPipeline",
        ),
        (BlockList("blocks"),),
        family="Wan 2.1 and 2.2, Lucy Edit",
        threshold=0.08,
        threshold_origin=_DEMO.format(1) + " on Wan 2.2",
    ),
    HostSpec(
        "WanVACETransformer3DModel",
        ("WanVACEPipeline", "Wan22VaceModularPipeline"),
        # The hint blocks run first; their hints are added between the main blocks.
        (
            BlockList("vace_blocks", ("control_hidden_states", "control_hidden_states")),
            BlockList("blocks"),
        ),
        family="Wan VACE",
        no_corrector="adds control hints between its blocks, which are not computed on reused "
        "steps, so its last blocks cannot run on them",
    ),
    HostSpec(
        "WanAnimateTransformer3DModel",
        ("WanAnimatePipeline",),
        (BlockList("blocks"),),
        family="Wan Animate",
    ),
    HostSpec(
        "WanAnimate2Transformer3DModel",
        ("WanAnimate2ModularPipeline",),
        (BlockList("blocks"),),
        (Head("head"),),
        family="Wan Animate 2",
        since="0.40",
        attention=None,
        attention_note="frames attend to those of a reference under a block mask",
        # Each segment begins with a call that fills a cache of keys and values of its reference.
        aside=("kv_cache_mode", "extract"),
        left_out=("is_uncondtion", 9),
    ),
    HostSpec(
        "ChronoEditTransformer3DModel",
        ("ChronoEditPipeline",),
        (BlockList("blocks"),),
        family="ChronoEdit",
    ),
    HostSpec(
        "SkyReelsV2Transformer3DModel",
        (
            "SkyReelsV2Pipeline",
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        (BlockList("blocks"),),
        family="SkyReels V2",
    ),
)

_HUNYUAN = (
    HostSpec(
        "HunyuanVideoTransformer3DModel",
        (
            "HunyuanVideoPipeline",
            "HunyuanVideoImageToVideoPipeline",
            "HunyuanSkyreelsImageToVideoPipeline",
        ),
        (
            BlockList("transformer_blocks", _JOINT),
            BlockList("single_transformer_blocks", _JOINT),
        ),
        family="HunyuanVideo, SkyReels V1",
        guidance="embedded",
        tokens=("video", "text"),
        attention="attn",
        mask="keys",
        threshold=0.12,
        threshold_origin=_DEMO.format(1),
    ),
    HostSpec(
        "HunyuanVideoFramepackTransformer3DModel",
        ("HunyuanVideoFramepackPipeline",),
        (
            BlockList("transformer_blocks", _JOINT),
            BlockList("single_transformer_blocks", _JOINT),
        ),
        (Head("norm_out", tail=True),),
        family="Framepack",
        guidance="embedded",
        tokens=("history", "video", "text"),
        attention=None,
        attention_note="frames of other resolutions stand before those of the clip",
    ),
    HostSpec(
        "HunyuanVideo15Transformer3DModel",
        (
            "HunyuanVideo15Pipeline",
            "HunyuanVideo15ImageToVideoPipeline",
            "HunyuanVideo15ModularPipeline",
        ),
        (BlockList("transformer_blocks", _JOINT),),
        family="HunyuanVideo 1.5",
        tokens=("video", "text"),
        attention="attn",
        mask="pairs",
    ),
)

_VIDEO = (
    HostSpec(
        "CogVideoXTransformer3DModel",
        (
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ),
        (BlockList("transformer_blocks", _JOINT),),
        (Head("norm_final"),),
        family="CogVideoX",
        guidance="batched",
        tokens=("text", "video"),
        threshold=0.08,
        threshold_origin=_DEMO.format(1) + " (0.12 on CogVideoX 1.5)",
    ),
    HostSpec(
        "ConsisIDTransformer3DModel",
        ("ConsisIDPipeline",),
        (BlockList("transformer_blocks", _JOINT),),
        (Head("norm_final", ("encoder_hidden_states", "hidden_states")),),
        family="ConsisID",
        guidance="batched",
        tokens=("text", "video"),
    ),
    HostSpec(
        "LTXVideoTransformer3DModel",
        (
            "LTXPipeline",
            "LTXImageToVideoPipeline",
            "LTXConditionPipeline",
            "LTXI2VLongMultiPromptPipeline",
            "LTXModularPipeline",
        ),
        (BlockList("transformer_blocks"),),
        family="LTX-Video",
        guidance="batched",
        threshold=0.15,
        threshold_origin=_DEMO.format(1),
    ),
    HostSpec(
        "LTX2VideoTransformer3DModel",
        (
            "LTX2Pipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2ConditionPipeline",
            "LTX2InContextPipeline",
            "LTX2HDRPipeline",
            "LTX2DFRPipeline",
        ),
        (BlockList("transformer_blocks", ("hidden_states", "audio_hidden_states")),),
        (Head("norm_out"), Head("audio_norm_out", ("audio_hidden_states",))),
        family="LTX-2",
        guidance="batched",
        untested=(
            (
                "LTX2DFRTemporalRefinePipeline",
                "refines in four distilled steps, too few to reuse any",
            ),
        ),
    ),
    HostSpec(
        "MochiTransformer3DModel",
        ("MochiPipeline",),
        (BlockList("transformer_blocks", _JOINT),),
        family="Mochi",
        guidance="batched",
        tokens=("video", "text"),
    ),
    HostSpec(
        "AllegroTransformer3DModel",
        ("AllegroPipeline",),
        (BlockList("transformer_blocks"),),
        family="Allegro",
        guidance="batched",
    ),
    HostSpec(
        "LatteTransformer3DModel",
        ("LattePipeline",),
        (BlockList("transformer_blocks"), BlockList("temporal_transformer_blocks")),
        family="Latte",
        guidance="batched",
        attention=None,
        attention_note="attention within a frame and along time in turn",
        interleaved=True,
    ),
    HostSpec(
        "EasyAnimateTransformer3DModel",
        ("EasyAnimatePipeline", "EasyAnimateInpaintPipeline"),
        (BlockList("transformer_blocks", _JOINT),),
        (Head("norm_final"),),
        family="EasyAnimate",
        guidance="batched",
        tokens=("text", "video"),
        untested=(
            (
                "EasyAnimateControlPipeline",
                "fails in Diffusers itself: it gives its prompt encoder an argument that this "
                "does not take",
            ),
        ),
    ),
    HostSpec(
        "CosmosTransformer3DModel",
        (
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        (BlockList("transformer_blocks"),),
        family="Cosmos 1, 2 and 2.5",
        times=("t", "sigma / (sigma + 1)", "sigma"),
    ),
    HostSpec(
        "Cosmos3OmniTransformer",
        ("Cosmos3OmniPipeline",),
        (BlockList("layers", ("und_seq", "gen_seq")),),
        (Head("norm_moe_gen", ("gen_seq",)),),
        family="Cosmos 3",
        since="0.39",
        tokens=("text", "video"),
        attention=None,
        attention_note="one packed sequence of several modalities",
        main="gen_seq",
        sample="vision_tokens",
        timestep="vision_timesteps",
    ),
    HostSpec(
        "SanaVideoTransformer3DModel",
        ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        (BlockList("transformer_blocks"),),
        family="SANA-Video",
        guidance="batched",
        attention=None,
        attention_note="linear attention",
    ),
    HostSpec(
        "SanaWMTransformer3DModel",
        ("SanaWMPipeline",),
        (BlockList("blocks", ("x",)),),
        (Head("final_layer", ("x",)),),
        family="SANA-WM",
        since="0.42",
        guidance="batched",
        attention=None,
        attention_note="recurrent attention in most blocks",
        main="x",
    ),
    HostSpec(
        "Kandinsky5Transformer3DModel",
        ("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
        (BlockList("visual_transformer_blocks", ("visual_embed",)),),
        (),
        family="Kandinsky 5",
        attention="self_attention",
        threshold=0.05,
        threshold_origin=_DEMO.format(1),
        main="visual_embed",
    ),
    HostSpec(
        "Kandinsky6Transformer3DModel",
        ("Kandinsky6TI2VAPipeline",),
        (BlockList("visual_transformer_blocks", ("vis", "aud")),),
        (),
        family="Kandinsky 6",
        since="0.42",
        attention="video_dec_block.self_attention",
        main="vis",
    ),
    HostSpec(
        "Kandinsky6SRTransformer3DModel",
        ("Kandinsky6SRPipeline",),
        (BlockList("visual_transformer_blocks"),),
        (),
        family="Kandinsky 6 super-resolution",
        since="0.42",
        guidance="embedded",
        attention=None,
        attention_note="sparse by itself",
    ),
    HostSpec(
        "MotifVideoTransformer3DModel",
        ("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
        (
            BlockList("transformer_blocks", _JOINT),
            BlockList("single_transformer_blocks", _JOINT),
        ),
        family="Motif-Video",
        since="0.39",
        tokens=("video", "text"),
        attention=None,
        attention_note="the last blocks take the video for their text",
        no_corrector="starts its last blocks from the patches again, with what the others made of "
        "them as their text, so these cannot run without the others",
    ),
    HostSpec(
        "MiniMaxH3Transformer3DModel",
        ("MiniMaxH3ModularPipeline",),
        (BlockList("transformer_blocks"),),
        family="MiniMax-H3",
        since="0.40",
        guidance="embedded",
        tokens=("text", "video"),
        attention="attn",
        video_rows="video_indices",
        levels=True,
    ),
    HostSpec(
        "HeliosTransformer3DModel",
        ("HeliosPipeline", "HeliosPyramidPipeline"),
        (BlockList("blocks"),),
        family="Helios",
        tokens=("history", "video"),
        attention=None,
        attention_note="frames of other resolutions stand before those of the clip",
    ),
    HostSpec(
        "AnyFlowTransformer3DModel",
        ("AnyFlowPipeline",),
        (BlockList("blocks"),),
        family="AnyFlow",
        since="0.39",
        guidance="batched",
    ),
    HostSpec(
        "AnyFlowFARTransformer3DModel",
        ("AnyFlowFARPipeline",),
        family="AnyFlow FAR",
        since="0.39",
        unsupported="fills a key-value cache in the blocks of every chunk, which blocks that do "
        "not run would leave stale; use AnyFlowPipeline, or run it without vidaccel",
    ),
)

ROWS = (*_WAN, *_HUNYUAN, *_VIDEO)
