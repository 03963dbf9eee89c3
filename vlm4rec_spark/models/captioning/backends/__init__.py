"""One file per captioning backend, and what loads each. All follow the protocol of captioner.py."""

from typing import Any

from vlm4rec_spark.models.captioning.captioner import Captioner, ModelSettings


def load_captioner(
    settings: ModelSettings, batch_size: int = 16, json_schema: dict[str, Any] | None = None
) -> Captioner:
    """Load the model, which is slow. Raises the backend's errors; UsageError for a missing library.

    `json_schema` makes answers JSON of that schema in vllm and endpoint, by guided decoding.
    The transformers backend ignores it.
    """
    if settings.backend == "fake":
        from vlm4rec_spark.models.captioning.backends.fake import FakeCaptioner

        return FakeCaptioner(settings.model, batch_size, json_schema)
    if settings.backend == "endpoint":
        from vlm4rec_spark.models.captioning.backends.endpoint import EndpointCaptioner

        return EndpointCaptioner(settings, json_schema)
    if settings.backend == "vllm":
        from vlm4rec_spark.models.captioning.backends.vllm import VllmCaptioner

        return VllmCaptioner(settings, json_schema)
    from vlm4rec_spark.models.captioning.backends.transformers import TransformersCaptioner

    return TransformersCaptioner(settings, batch_size)
