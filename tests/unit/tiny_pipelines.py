"""Pipelines of published classes, tiny and with random weights, made from configs; no file of a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("a", "cat", "dog", "in", "oil")


def clip_parts(directory: Path, projected: bool = False, number: str = "") -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    vocabulary = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz,"),
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return {f"tokenizer{number}": tokenizer, f"text_encoder{number}": kind(config)}


def vae(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, layers_per_block=1, **settings,
    )  # fmt: skip


def unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, **settings,
    )  # fmt: skip


def stable_diffusion(directory: Path) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    parts = {"unet": unet(cross_attention_dim=16), "vae": vae(), "scheduler": PNDMScheduler(skip_prk_steps=True)}
    return StableDiffusionPipeline(
        **parts, **clip_parts(directory), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def sdxl(directory: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    added: dict[str, Any] = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 16,
        "use_linear_projection": True,
    }  # fmt: skip
    both = clip_parts(directory) | clip_parts(directory, projected=True, number="_2")
    return StableDiffusionXLPipeline(
        unet=unet(cross_attention_dim=32, **added), vae=vae(), scheduler=EulerDiscreteScheduler(), **both
    )


def flux(directory: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer_2 = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    )
    encoder_2 = T5EncoderModel(T5Config(vocab_size=16, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1))
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    parts = {"transformer": transformer, "tokenizer_2": tokenizer_2, "text_encoder_2": encoder_2, **clip_parts(directory)}
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(shift_factor=0.1), **parts)


def dit(directory: Path) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return DiTPipeline(transformer, vae(), DDIMScheduler(), id2label={"0": "cat", "1": "dog"})
