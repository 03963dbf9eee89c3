"""Captions by vLLM: a stream of photos into one engine, which keeps the GPU full across Arrow batches.

Knows the engine, its chat template and what is at work in it; knows nothing of photo files, retries or Spark.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.backends.batches import error_class
from vlm4rec_spark.models.captioning.backends.transformers import load_processor
from vlm4rec_spark.models.captioning.captioner import Answer, Request

_AT_WORK = 128
"""Photos in the engine. Of a 7B model with grouped heads, 128 × 2,988 tokens take 50 GB; what doesn't fit waits there.

Twice as many would save 2 % of the time, since a step reads the weights once for all of them; and when the process
dies, each is tried again alone.
"""
_AHEAD = 16
"""Photos being prepared, or ready for the engine: more than a second's work of one GPU."""
_SETTINGS = {
    # The engine's own process starts afresh: a copy of this one would hold our sockets open, and can't use a CUDA that
    # was asked for before.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Nothing is drawn at random, so no kernel need be compiled for that.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # It reports each start to its makers otherwise.
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmCaptioner:
    """Greedy descriptions from the model at `source` (a folder or a hub name).

    The engine runs in a process of its own, as by vLLM's default, and photos are prepared on a thread of this one: in
    one process the two would wait for each other's hold on Python's lock.
    """

    def __init__(
        self,
        source: str,
        revision: str,
        max_new_tokens: int,
        json_schema: dict[str, Any] | None = None,
    ):
        os.environ |= _SETTINGS
        try:
            from vllm import LLMEngine, SamplingParams
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
            from vllm.usage.usage_lib import UsageContext
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The vllm backend needs an environment of its own: "
                "pip install 'vlm4rec_spark[local,vllm]' -c constraints-vllm.txt"
            ) from missing

        self.at_once, self.batch = _AT_WORK + _AHEAD, 1
        self.begins: Callable[[Sequence[str]], None] = lambda keys: None
        self._processor, pixels = load_processor(source, revision)
        # As for offline use, where throughput counts and not the first token: more tokens in each step.
        self._engine: Any = LLMEngine.from_engine_args(
            _arguments(source, revision, pixels), UsageContext.LLM_CLASS
        )
        # The one setting of the model's own that greedy decoding in transformers heeds as well.
        own = self._engine.model_config.get_diff_sampling_param()
        self._sampling = SamplingParams(
            temperature=0,
            max_tokens=max_new_tokens,
            repetition_penalty=own.get("repetition_penalty", 1.0),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(json=json_schema) if json_schema else None,
        )
        self._ahead = ThreadPoolExecutor(1)
        self._prepared: deque[tuple[str, Future]] = deque()
        self._at_work = 0

    def add(self, request: Request) -> None:
        self.begins([request.key])
        self._prepared.append((request.key, self._ahead.submit(self._prepare, request)))

    def step(self) -> list[Answer]:
        """One step of the engine: a token for each photo in it. Often nothing is answered yet."""
        refused = self._admit()
        if not self._at_work:
            return refused
        done = [self._answer(output) for output in self._engine.step()]
        self._at_work -= len(done)
        return refused + done

    def close(self) -> None:
        """Give the GPU back."""
        self._ahead.shutdown(cancel_futures=True)
        self._engine.engine_core.shutdown()

    def _prepare(self, request: Request) -> Any:
        """The photo's tensors and the prompt's tokens, as the engine takes them."""
        chat = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": request.prompt}],
            }
        ]
        text = self._processor.apply_chat_template(chat, add_generation_prompt=True)
        prompt = {"prompt": text, "multi_modal_data": {"image": request.image}}
        return self._engine.renderer.render_cmpl([prompt])[0]

    def _admit(self) -> list[Answer]:
        """Hand the engine what is ready; wait only while it has nothing to do. What it can't take is answered."""
        refused = list[Answer]()
        while self._prepared and self._at_work < _AT_WORK:
            key, prepared = self._prepared[0]
            if not prepared.done() and (self._at_work or refused):
                break
            self._prepared.popleft()
            try:
                self._engine.add_request(key, prepared.result(), self._sampling)
                self._at_work += 1
            except ValueError as failure:  # above all, more tokens than the model has room for
                refused.append(Answer(key, None, error_class="bad_request", error=str(failure)))
            except Exception as failure:
                refused.append(
                    Answer(key, None, error_class=error_class(failure), error=str(failure))
                )
        return refused

    def _answer(self, output: Any) -> Answer:
        said = output.outputs[0].token_ids
        text = self._processor.tokenizer.decode(said, skip_special_tokens=True)
        return Answer(
            output.request_id, " ".join(text.split()), len(output.prompt_token_ids), len(said)
        )


def _arguments(source: str, revision: str, pixels: dict[str, str]) -> Any:
    import torch
    from vllm import EngineArgs

    gpu = torch.cuda.is_available()
    return EngineArgs(
        model=source,
        revision=revision,
        tokenizer_revision=revision,
        runner="generate",
        load_format="safetensors",
        # A CPU is for trying out: as the transformers backend has it there, and without minutes of compilation.
        dtype="auto" if gpu else "float32",
        enforce_eager=not gpu,
        # The model's own, or as much as there is memory for.
        max_model_len=-1,
        max_num_seqs=_AT_WORK,
        # No room is kept for films.
        limit_mm_per_prompt={"image": 1, "video": 0},
        # Each photo comes once, before the words that prompts share: nothing would be found in a cache.
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        mm_processor_kwargs=pixels,
        disable_log_stats=True,
    )
