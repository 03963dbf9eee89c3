"""The captioner before it has learnt anything: a LLaVA of a vision tower, a projector and a small Llama.

Made of transformers' own classes, so that the ordinary backend loads it and no code comes with the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from vlm4rec_spark.errors import UsageError

SIDE = 128
"""Pixels to which a photo is brought, each way; its sides' ratio is lost."""
_WIDTH = 256
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
END, IMAGE = _SPECIAL.index("</s>"), _SPECIAL.index("<image>")
ASKED = "answer"
"""The one word that follows the photo. What it is asked is left out by the template: it couldn't obey."""
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} " + ASKED + "{% endif %}"
)


def build(
    sentences: Iterable[str], tower: Any = None, template: str = _TEMPLATE
) -> tuple[Any, Any]:
    """An untrained model and its processor, whose words are those of the sentences. Seed torch before.

    `tower`: the configuration of a Swin or CLIP vision model. By default a Swin that ends in 4 x 4 places: of the
    towers that were timed it made most of a core, since it has most weights where a photo has fewest places, and
    sixteen image tokens cost the decoder next to nothing.
    """
    from transformers import (
        CLIPImageProcessor,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SwinConfig,
    )

    tower = tower or SwinConfig(
        image_size=SIDE,
        patch_size=4,
        embed_dim=48,
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 6, 12],
        window_size=4,
        drop_path_rate=0.1,
    )
    # A Swin halves its places from stage to stage; a CLIP puts a class token before its own, which LLaVA leaves out.
    select: Literal["default", "full"]
    patch, extra, select = (
        (tower.patch_size * 2 ** (len(tower.depths) - 1), 0, "full")
        if tower.model_type == "swin"
        else (tower.patch_size, 1, "default")
    )
    tokenizer = _tokenizer(sentences)
    images = CLIPImageProcessor(
        size={"height": tower.image_size, "width": tower.image_size},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=select,
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=extra,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=3 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=END,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy=select,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, END
    return model, processor


def inherit(model: Any, processor: Any, folder: Path) -> list[int]:
    """Give an untrained model of `build` the weights of the captioner in `folder`; the places of words that it lacks.

    What sees edges and colours is frozen: the patches and the first half of the tower's stages. Words that both know
    keep what they mean, others are new.

    Raises UsageError for a folder without such a captioner.
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    try:
        other = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
        theirs = AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
    except Exception as wrong:
        raise UsageError(
            f"{folder}: no captioner can be read from it: {str(wrong).splitlines()[0]}"
        ) from wrong
    known, ours = other.state_dict(), model.state_dict()
    words = {
        name
        for name, each in ours.items()
        if each.shape[0] == len(processor.tokenizer)
        and each.ndim == 2
        and name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    unlike = [
        name
        for name, each in ours.items()
        if name not in known or (name not in words and known[name].shape != each.shape)
    ]
    if unlike:
        raise UsageError(
            f"{folder}: its captioner is of another shape than those that are trained here "
            f"({len(unlike):,} of {len(ours):,} weights, such as {unlike[0]}). Start from the packaged "
            "one, or from one that this command made."
        )
    both = [
        (place, theirs[word])
        for word, place in processor.tokenizer.get_vocab().items()
        if word in theirs
    ]
    here, there = (torch.tensor(places) for places in zip(*both, strict=True))
    with torch.no_grad():
        for name, each in ours.items():
            if name in words:
                each[here] = known[name][there]
            else:
                each.copy_(known[name])
    tower = model.model.vision_tower
    stages = tower.encoder.layers
    for part in (tower.embeddings, *stages[: len(stages) // 2]):
        part.requires_grad_(False)
    return [place for word, place in processor.tokenizer.get_vocab().items() if word not in theirs]


def _tokenizer(sentences: Iterable[str]) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Not at hyphens: "t-shirt" is one word, and decoding would put blanks into it.
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,]"), "isolated")]
    )
    words = sorted(
        {word for said in sentences for word, _ in splitter.pre_tokenize_str(said)} | {ASKED}
    )
    core = Tokenizer(
        models.WordLevel(
            {word: place for place, word in enumerate([*_SPECIAL, *words])}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=True,
    )
