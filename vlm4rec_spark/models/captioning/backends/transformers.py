"""Any image-text-to-text model that transformers loads: LLaVA-NeXT, Qwen2.5-VL, SmolVLM, the packaged one.

Knows the chat template, padding and decoding; knows nothing of photo files, retries or Spark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.captioner import Answer, Request


class TransformersCaptioner(BatchCaptioner):
    """Greedy descriptions from the model at `source` (a folder or a hub name), on CUDA, MPS or the CPU.

    `compiled`: decoding by a compiled graph over a cache of fixed size. A step is then bound by memory and not by the
    launch of its kernels, but each new size of batch and prompt is compiled first.
    """

    def __init__(
        self,
        source: str,
        revision: str,
        max_new_tokens: int,
        batch_size: int,
        torch_compile: bool = False,
    ):
        super().__init__(batch_size)
        try:
            import torch
            from transformers import AutoModelForImageTextToText
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The captioner needs: pip install 'vlm4rec_spark[local]'"
            ) from missing

        self.torch = torch
        self.device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        self.processor, _ = load_processor(source, revision)
        # Answers are generated to the right of the prompt: with right padding a short prompt would see pad tokens
        # between itself and its answer, and a photo's caption would depend on its batch.
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token_id is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        # On a CPU half precision is emulated and slower; older GPUs have no bfloat16.
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32
            if self.device == "cpu"
            else torch.bfloat16
            if self._bfloat16()
            else torch.float16,
            use_safetensors=True,
        )
        self.model = model.to(self.device).eval()
        self.max_new_tokens = max_new_tokens
        # transformers compiles by itself where the cache is static and the device gains by it.
        self.cache = {"cache_implementation": "static"} if torch_compile else {}

    def _bfloat16(self) -> bool:
        return self.device == "mps" or self.torch.cuda.is_bf16_supported(including_emulation=False)

    def describe(self, batch: Sequence[Request]) -> list[Answer]:
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": request.prompt}],
                }
            ]
            for request in batch
        ]
        texts = [
            self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats
        ]
        inputs = self.processor(
            images=[[request.image] for request in batch],
            text=texts,
            padding=True,
            return_tensors="pt",
        ).to(self.device, dtype=self.model.dtype)
        try:
            with self.torch.inference_mode():
                output = self.model.generate(
                    **inputs,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    **self.cache,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                )
        except self.torch.OutOfMemoryError:
            self.torch.cuda.empty_cache()  # or the smaller batch finds the same memory in pieces
            raise
        said = output[:, inputs["input_ids"].shape[1] :]
        captions = self.processor.batch_decode(said, skip_special_tokens=True)
        tokens_in = inputs["attention_mask"].sum(dim=1).tolist()
        tokens_out = (said != self.processor.tokenizer.pad_token_id).sum(dim=1).tolist()
        return [
            Answer(request.key, " ".join(text.split()), int(a), int(b))
            for request, text, a, b in zip(batch, captions, tokens_in, tokens_out, strict=True)
        ]


def load_processor(source: str, revision: str) -> tuple[Any, dict[str, str]]:
    """The model's processor, and how it was told to make pixels: by Pillow, the same in every environment.

    Those of the models that see films too can't be told: ImportError, or in older versions AttributeError.
    """
    from transformers import AutoProcessor

    pixels = {"backend": "pil"}
    try:
        return AutoProcessor.from_pretrained(source, revision=revision, **pixels), pixels
    except (ImportError, AttributeError):
        return AutoProcessor.from_pretrained(source, revision=revision), {}
