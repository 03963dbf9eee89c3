"""Captions by vLLM: one stream of photos keeps its engine busy across Arrow batches.

Knows the engine and its requests; knows nothing of photo files, retries or Spark.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.backends.batches import failed
from vlm4rec_spark.models.captioning.backends.transformers import chat_text, load_processor
from vlm4rec_spark.models.captioning.captioner import Answer, Captioner, ModelSettings, Request

_ENGINE_PHOTOS = 128
"""Photos in the engine. For a 7B model with grouped heads, 128 × 2,988 tokens take 50 GB.

Twice as many would save 2 % of the time: a step reads the weights once for all photos.
But when the process dies, each photo is retried alone.
"""
_PREPARED_PHOTOS = 16
"""Photos in preparation or ready for the engine: more than a second's work of one GPU."""
_ENVIRONMENT = {
    # A forked engine would keep our sockets open, and couldn't use CUDA once we have queried it.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Greedy decoding doesn't sample, so it needs no compiled sampler.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Otherwise vLLM reports every start to its authors.
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmCaptioner(Captioner):
    """Greedy descriptions by the model at `settings.source`.

    The engine has its own process, as is vLLM's default. A thread of this one prepares photos.
    In one process the two would wait for Python's lock.
    """

    def __init__(self, settings: ModelSettings, json_schema: dict[str, Any] | None):
        os.environ |= _ENVIRONMENT
        try:
            from vllm import LLMEngine, SamplingParams
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
            from vllm.usage.usage_lib import UsageContext
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The vllm backend needs an environment of its own: "
                "pip install 'vlm4rec_spark[local,vllm]' -c constraints-vllm.txt"
            ) from missing

        self.max_in_flight = _ENGINE_PHOTOS + _PREPARED_PHOTOS
        self.batch_size = 1
        self._processor, options = load_processor(settings.source, settings.revision)
        # Offline use: more tokens per step, since throughput counts and not the first token.
        self._engine: Any = LLMEngine.from_engine_args(
            _arguments(settings, options), UsageContext.LLM_CLASS
        )
        # The only one of the model's defaults that greedy decoding in transformers also applies.
        defaults = self._engine.model_config.get_diff_sampling_param()
        self._sampling = SamplingParams(
            temperature=0,
            max_tokens=settings.max_new_tokens,
            repetition_penalty=defaults.get("repetition_penalty", 1.0),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(json=json_schema) if json_schema else None,
        )
        self._preparer = ThreadPoolExecutor(1)
        self._prepared: deque[tuple[str, Future]] = deque()
        self._in_engine = 0

    def add(self, request: Request) -> None:
        self.on_begin([request.key])
        self._prepared.append((request.key, self._preparer.submit(self._prepare, request)))

    def step(self) -> list[Answer]:
        """One step of the engine: one token per photo. It often answers nothing yet."""
        refused = self._admit()
        if not self._in_engine:
            return refused
        answers = [self._answer(output) for output in self._engine.step()]
        self._in_engine -= len(answers)
        return refused + answers

    def close(self) -> None:
        """Free the GPU."""
        self._preparer.shutdown(cancel_futures=True)
        self._engine.engine_core.shutdown()

    def _prepare(self, request: Request) -> Any:
        """The photo's tensors and the prompt's tokens, as the engine takes them."""
        text = chat_text(self._processor, request.prompt)
        prompt = {"prompt": text, "multi_modal_data": {"image": request.image}}
        return self._engine.renderer.render_cmpl([prompt])[0]

    def _admit(self) -> list[Answer]:
        """Give the engine what is ready; wait only if it is idle. Answers refused photos."""
        refused = list[Answer]()
        while self._prepared and self._in_engine < _ENGINE_PHOTOS:
            key, prepared = self._prepared[0]
            if not prepared.done() and (self._in_engine or refused):
                break
            self._prepared.popleft()
            try:
                self._engine.add_request(key, prepared.result(), self._sampling)
                self._in_engine += 1
            except ValueError as failure:  # mostly more tokens than the model takes
                refused.append(Answer(key, None, error_class="bad_request", error=str(failure)))
            except Exception as failure:
                refused.append(failed(key, failure))
        return refused

    def _answer(self, output: Any) -> Answer:
        tokens = output.outputs[0].token_ids
        text = self._processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(
            output.request_id, " ".join(text.split()), len(output.prompt_token_ids), len(tokens)
        )


def _arguments(settings: ModelSettings, processor_options: dict[str, str]) -> Any:
    import torch
    from vllm import EngineArgs

    gpu = torch.cuda.is_available()
    return EngineArgs(
        model=settings.source,
        revision=settings.revision,
        tokenizer_revision=settings.revision,
        runner="generate",
        load_format="safetensors",
        # A CPU is for trials: the transformers backend's precision, and no slow compilation.
        dtype="auto" if gpu else "float32",
        enforce_eager=not gpu,
        # The model's own maximum, or what fits in memory.
        max_model_len=-1,
        max_num_seqs=_ENGINE_PHOTOS,
        # Reserves no memory for videos.
        limit_mm_per_prompt={"image": 1, "video": 0},
        # Each photo occurs once and precedes the prompt's words, so a cache would never hit.
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        mm_processor_kwargs=processor_options,
        disable_log_stats=True,
    )
