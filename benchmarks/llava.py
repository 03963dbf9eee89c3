"""A folder with a LLaVA-NeXT of random weights, and the roofline of captioning with it.

Needs no network. There is a tiny model for machines without a GPU.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from vlm4rec_spark.models.captioning.prompts import load_prompt

PROMPT = load_prompt("describe.1").text
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer :{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
# Names in published models, which vLLM 0.22 reads.
PUBLISHED = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}


@dataclass(frozen=True)
class Shapes:
    """Of a LLaVA-NeXT.

    Photos are `photo` pixels wide and high. They make four tiles of `tile` pixels, and one of all.
    """

    photo: int
    tile: int
    vision: dict[str, int]
    text: dict[str, int]

    @property
    def patches(self) -> int:
        """Along a tile's side."""
        return self.tile // self.vision["patch_size"]


BIG = Shapes(
    672,
    336,
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    {
        "vocab_size": 32_064,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
    },
)
"""llava-hf/llava-v1.6-mistral-7b-hf."""
TINY = Shapes(
    112,
    56,
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
    },
    {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
    },
)


def write(
    folder: Path,
    shapes: Shapes,
    device: str,
) -> None:
    """The model and its processor; it never ends a text by itself."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**shapes.vision, image_size=shapes.tile, projection_dim=64),
        text_config=MistralConfig(
            **shapes.text, sliding_window=None, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=_pinpoints(shapes),
        dtype="bfloat16",
        tie_word_embeddings=False,
        architectures=[LlavaNextForConditionalGeneration.__name__],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlavaNextForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    # Some word is always likelier than the end.
    model.lm_head.weight.data[config.text_config.eos_token_id] = 0
    model.config.save_pretrained(folder)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.generation_config.save_pretrained(folder)
    weights = {
        _published(name): tensor.cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _processor(shapes).save_pretrained(folder)


def _pinpoints(shapes: Shapes) -> list[list[int]]:
    return [
        [down * shapes.tile, along * shapes.tile]
        for down, along in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    ]


def _published(name: str) -> str:
    for prefix, published in PUBLISHED.items():
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    raise ValueError(name)


def _processor(shapes: Shapes) -> LlavaNextProcessor:
    splitter = pre_tokenizers.Whitespace()
    prompt_words = [word for word, _ in splitter.pre_tokenize_str(PROMPT)]
    words = list(dict.fromkeys([*SPECIAL, "answer", ":", *prompt_words]))
    words += [f"word{number}" for number in range(shapes.text["vocab_size"] - len(words))]
    ids = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": shapes.tile},
        crop_size={"height": shapes.tile, "width": shapes.tile},
        image_grid_pinpoints=_pinpoints(shapes),
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=shapes.vision["patch_size"],
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def photo(number: int, shapes: Shapes) -> bytes:
    """A JPEG unlike any other: soft patches of colour."""
    small = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    large = Image.fromarray(small).resize((shapes.photo, shapes.photo), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    large.save(file, "JPEG", quality=90)
    return file.getvalue()


@dataclass(frozen=True)
class Ceilings:
    """The most that a device does in a second."""

    operations: float
    bytes: float
    number: int
    """Bytes of a number."""


def ceilings(device: str) -> Ceilings:
    """Measured: products of large matrices, and copies of a large block."""
    gpu = device == "cuda"
    side = 8192 if gpu else 1024
    number_type = torch.bfloat16 if gpu else torch.float32
    square = torch.randn(side, side, device=device).to(number_type)
    block = torch.zeros((2 << 30) if gpu else (64 << 20), dtype=torch.uint8, device=device)
    copy = torch.empty_like(block)
    product_seconds = _best(lambda: square @ square, gpu)
    copy_seconds = _best(lambda: copy.copy_(block), gpu)
    return Ceilings(
        operations=2 * side**3 / product_seconds,
        bytes=2 * block.numel() / copy_seconds,
        number=square.element_size(),
    )


def _best(call: Callable[[], object], gpu: bool) -> float:
    """Seconds that it takes, the fastest of twenty times."""
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def roofline(
    shapes: Shapes, best: Ceilings, prompt_tokens: int, new_tokens: int, batch: int
) -> float:
    """Photos per second at the device's limits: operations for the prefill, bytes for decoding."""
    text = shapes.text
    vision = shapes.vision
    depth = text["num_hidden_layers"]
    width = text["hidden_size"]
    kv = text["num_key_value_heads"] * width // text["num_attention_heads"]
    attention = 2 * width * (width + kv)
    layers = depth * (attention + 3 * width * text["intermediate_size"])
    # A pair of a token and an earlier one: a product with its key and one with its value.
    pairs = 2 * depth * prompt_tokens**2 * width
    tower_width = vision["hidden_size"]
    tower_layer = 4 * tower_width**2 + 2 * tower_width * vision["intermediate_size"]
    tower = vision["num_hidden_layers"] * tower_layer
    operations = 2 * layers * prompt_tokens + pairs + 2 * tower * 5 * shapes.patches**2
    weights = layers + text["vocab_size"] * width
    cache = 2 * depth * kv * (prompt_tokens + new_tokens / 2)
    decoded_bytes = new_tokens * best.number * (weights / batch + cache)
    return 1 / (operations / best.operations + decoded_bytes / best.bytes)
