"""Any image-text-to-text model that transformers loads: LLaVA-NeXT, Qwen2.5-VL, SmolVLM, the packaged demo model.

Knows the chat template, padding and decoding; knows nothing of photo files, retries or Spark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioners import Caption


class TransformersCaptioner:
    """Greedy descriptions from the model at `source` (a folder or a hub name), on CUDA, MPS or the CPU."""

    def __init__(self, source: str, revision: str, max_new_tokens: int):
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as missing:
            raise UsageError(f"{missing}. The captioner needs: pip install 'vlm4rec_spark[local]'") from missing

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.processor = AutoProcessor.from_pretrained(source, revision=revision)
        # Answers are generated to the right of the prompt: with right padding a short prompt would see pad tokens
        # between itself and its answer, and a photo's caption would depend on its batch.
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token_id is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        # fp32 on a CPU: half precision is emulated there and slower.
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32 if self.device == "cpu" else torch.bfloat16,
            use_safetensors=True,
        )
        self.model = model.to(self.device).eval()
        self.max_new_tokens = max_new_tokens

    def caption(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Caption]:
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts
        ]
        texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = self.processor(
            images=[[image] for image in images], text=texts, padding=True, return_tensors="pt"
        ).to(self.device, dtype=self.model.dtype)
        with self.torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        answers = output[:, inputs["input_ids"].shape[1] :]
        captions = self.processor.batch_decode(answers, skip_special_tokens=True)
        asked = inputs["attention_mask"].sum(dim=1).tolist()
        said = (answers != self.processor.tokenizer.pad_token_id).sum(dim=1).tolist()
        return [
            Caption(" ".join(text.split()), int(a), int(b)) for text, a, b in zip(captions, asked, said, strict=True)
        ]
