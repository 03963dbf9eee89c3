"""Any image-text-to-text model of transformers: LLaVA-NeXT, Qwen2.5-VL, SmolVLM, the packaged one.

Knows the chat template, padding and decoding; knows nothing of photo files, retries or Spark.
"""

from collections.abc import Sequence
from typing import Any

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.captioner import Answer, ModelSettings, Request


class TransformersCaptioner(BatchCaptioner):
    """Greedy descriptions by the model at `settings.source`, on CUDA, MPS or the CPU.

    With `settings.torch_compile`, decode by a compiled graph over a cache of fixed size.
    Memory then limits the speed, not kernel launches.
    Each new size of batch and prompt is compiled first.
    """

    def __init__(self, settings: ModelSettings, batch_size: int):
        super().__init__(batch_size)
        try:
            import torch
            from transformers import AutoModelForImageTextToText
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The captioner needs: pip install 'vlm4rec_spark[local]'"
            ) from missing

        self.torch = torch
        self.device = best_device()
        self.processor, _ = load_processor(settings.source, settings.revision)
        # Answers follow on the right. With right padding, a short prompt would have pad tokens
        # before its answer, and a photo's caption would depend on its batch.
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token_id is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        model: Any = AutoModelForImageTextToText.from_pretrained(
            settings.source,
            revision=settings.revision,
            dtype=self._dtype(),
            use_safetensors=True,
        )
        self.model = model.to(self.device).eval()
        self.max_new_tokens = settings.max_new_tokens
        # With a static cache transformers compiles on devices that benefit.
        self.cache = {"cache_implementation": "static"} if settings.torch_compile else {}

    def _dtype(self) -> Any:
        if self.device == "cpu":
            return self.torch.float32  # half precision is emulated there, and slower
        if self.device == "mps" or self.torch.cuda.is_bf16_supported(including_emulation=False):
            return self.torch.bfloat16
        return self.torch.float16

    def describe(self, batch: Sequence[Request]) -> list[Answer]:
        inputs = self.processor(
            images=[[request.image] for request in batch],
            text=[chat_text(self.processor, request.prompt) for request in batch],
            padding=True,
            return_tensors="pt",
        ).to(self.device, dtype=self.model.dtype)
        pad_token = self.processor.tokenizer.pad_token_id
        try:
            with self.torch.inference_mode():
                output = self.model.generate(
                    **inputs,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    **self.cache,
                    pad_token_id=pad_token,
                )
        except self.torch.OutOfMemoryError:
            self.torch.cuda.empty_cache()  # defragments it for the smaller batch
            raise
        generated = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(generated, skip_special_tokens=True)
        input_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        output_tokens = (generated != pad_token).sum(dim=1).tolist()
        return [
            Answer(request.key, " ".join(text.split()), int(tokens_in), int(tokens_out))
            for request, text, tokens_in, tokens_out in zip(
                batch, texts, input_tokens, output_tokens, strict=True
            )
        ]


def load_processor(source: str, revision: str) -> tuple[Any, dict[str, str]]:
    """The model's processor, and the options that it was loaded with.

    Pillow makes the pixels, so they are the same in every environment.
    Models that also take videos have no such option: ImportError, or AttributeError before.
    """
    from transformers import AutoProcessor

    options = {"backend": "pil"}
    try:
        return AutoProcessor.from_pretrained(source, revision=revision, **options), options
    except (ImportError, AttributeError):
        return AutoProcessor.from_pretrained(source, revision=revision), {}


def chat_text(processor: Any, prompt: str) -> str:
    """A photo and a prompt in the model's chat template, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True)


def best_device() -> str:
    """cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
