"""The untrained captioner: a LLaVA of a vision tower, a projector and a small Llama.

Made of transformers' own classes, so that the ordinary backend loads it without any code of ours.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

SIDE = 128
"""Photos are resized to a square of so many pixels; the ratio of their sides is lost."""
_WIDTH = 256
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
END = _SPECIAL.index("</s>")
IMAGE = _SPECIAL.index("<image>")
ANSWER = "answer"
"""The one word that follows the photo. The template drops the prompt: the model couldn't obey."""
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} " + ANSWER + "{% endif %}"
)


class _Patches(NamedTuple):
    """How LLaVA counts a tower's image tokens."""

    size: int
    """Pixels."""
    class_tokens: int
    strategy: Literal["default", "full"]


def build(
    sentences: Iterable[str],
    tower: Any = None,
    template: str = _TEMPLATE,
) -> tuple[Any, Any]:
    """An untrained model and its processor, whose words are those of the sentences.

    Seed torch before.

    `tower` is the configuration of a Swin or CLIP vision model. By default it is a Swin that ends
    in 4 x 4 patches. It was the fastest on a CPU core for its accuracy: most of its weights are
    where the patches are few. Sixteen image tokens cost the decoder next to nothing.
    """
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
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
    if tower.model_type == "swin":
        # A Swin merges four patches into one from stage to stage.
        patches = _Patches(tower.patch_size * 2 ** (len(tower.depths) - 1), 0, "full")
    else:
        # A CLIP puts a class token first, which LLaVA leaves out.
        patches = _Patches(tower.patch_size, 1, "default")
    processor = _processor(_tokenizer(sentences), tower.image_size, patches, template)
    decoder = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=3 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy=patches.strategy,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = END
    return model, processor


def _processor(
    tokenizer: Any,
    side: int,
    patches: _Patches,
    template: str,
) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patches.size,
        vision_feature_select_strategy=patches.strategy,
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=patches.class_tokens,
    )


def _tokenizer(sentences: Iterable[str]) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Not at hyphens: "t-shirt" is one word, and decoding would put blanks into it.
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,]"), "isolated")]
    )
    words = {word for text in sentences for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = [*_SPECIAL, *sorted(words | {ANSWER})]
    ids = {word: number for number, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
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
