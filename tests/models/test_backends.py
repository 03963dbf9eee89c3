"""Captioners: the contract of all backends, the fake's faults, model ids, the packaged model."""

import base64
import importlib.util
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import transformers
from hostile_photos import encoded
from loopback import VARIABLES, ReceivedRequest, Reply, response_body, serving
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models

from vlm4rec_spark.demo.drawing import ATTRIBUTES, SIZE, render
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.attributes import SCHEMA
from vlm4rec_spark.models.captioning.attributes import parse as parse_attributes
from vlm4rec_spark.models.captioning.backends import load_captioner
from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.backends.vllm import VllmCaptioner
from vlm4rec_spark.models.captioning.caption_template import extract_attributes
from vlm4rec_spark.models.captioning.captioner import (
    PACKAGED_MODEL,
    Answer,
    Captioner,
    ModelSettings,
    Request,
    caption_all,
)
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.models.captioning.supervisor import Photo, Supervisor
from vlm4rec_spark.training.network import build

FRESH_SEED = 3_000_000
"""Neither the training, nor its held-out renderings, nor the shop use such seeds."""
PROMPT = load_prompt("describe.1").text
RED = Image.new("RGB", (8, 8), (200, 0, 0))
GREEN = Image.new("RGB", (8, 8), (0, 200, 0))
BLUE = Image.new("RGB", (8, 8), (0, 0, 200))
BLANK = Image.new("RGB", (SIZE, SIZE), (160, 160, 160))


def fake_settings(instructions: str) -> ModelSettings:
    return ModelSettings(backend="fake", model=instructions)


@cache
def packaged() -> Captioner:
    return load_captioner(ModelSettings())


@cache
def fresh() -> tuple[list[dict[str, str]], list[Image.Image]]:
    """True attributes and photos of 64 renderings that no model was trained on."""
    renderings = [render(FRESH_SEED + number) for number in range(64)]
    return [attributes for attributes, _ in renderings], [photo for _, photo in renderings]


def enlarge_weights(model: torch.nn.Module) -> None:
    """With its small initial weights a model only repeats the prompt's last word."""
    for weights in model.parameters():
        weights.data *= 8 if weights.ndim > 1 else 1


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """The folder of a LLaVA with random weights. Its nonsense depends on photo and prompt."""
    folder = tmp_path_factory.mktemp("models") / "untrained"
    torch.manual_seed(0)
    tower = transformers.CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=128,
        patch_size=16,
    )
    model, processor = build([*PROMPTS, *NONSENSE], tower, LLAVA_TEMPLATE)
    enlarge_weights(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Published models have these names, and vLLM needs them. New transformers write shorter ones.
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


NONSENSE = ["A soft warm thing.", "Say it all once more, in a rustic style."]
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer{% endif %}"
)
QWEN_TEMPLATE = """
{%- for message in messages %}<|im_start|> {{ message['role'] }}{{ ' ' -}}
{% for part in message['content'] %}
{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %} {{ part['text'] }} {% endif %}
{%- endfor %}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_start|> assistant {% endif %}"""
QWEN_TEXT_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
QWEN_IMAGE_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def qwen_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = sorted(set(" ".join(["user assistant made warm soft", *PROMPTS]).split()))
    tokens = [*QWEN_TEXT_TOKENS, *QWEN_IMAGE_TOKENS, *words]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", *QWEN_IMAGE_TOKENS],
    )


def qwen_config(vocab_size: int) -> transformers.Qwen2_5_VLConfig:
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            # Heads of 32 are the smallest that vLLM has kernels for on a CPU.
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 10_000.0,
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """The folder of a small Qwen2.5-VL with random weights.

    The number of a photo's tokens depends on its size. Positions have three axes.
    """
    folder = tmp_path_factory.mktemp("models") / "qwen"
    tokenizer = qwen_tokenizer()
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(
            patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=112 * 112
        ),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(qwen_config(len(tokenizer)))
    model.generation_config.repetition_penalty = 1.3  # the published models have one too
    enlarge_weights(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def requests(photos: Sequence[Image.Image], prompts: str | Sequence[str]) -> list[Request]:
    """Requests with keys 0, 1, …: one prompt for all photos, or one for each."""
    if isinstance(prompts, str):
        prompts = [prompts] * len(photos)
    pairs = zip(photos, prompts, strict=True)
    return [Request(str(number), photo, prompt) for number, (photo, prompt) in enumerate(pairs)]


def texts(
    captioner: Captioner, photos: Sequence[Image.Image], prompts: str | Sequence[str] = PROMPT
) -> list[str]:
    """The captions, in order; "" for photos without one."""
    answers = caption_all(captioner, requests(photos, prompts))
    return [answer.text or "" for answer in answers.values()]


@cache
def described() -> list[str]:
    """The packaged model's captions of the fresh photos."""
    return texts(packaged(), fresh()[1])


# The contract of all backends


SIZES = [(40, 70), (70, 40), (64, 64), (120, 30), (64, 64), (70, 40)]
PHOTOS = [
    Image.fromarray(
        np.random.default_rng(number).integers(0, 256 - 40 * number, (*size, 3), np.uint8)
    )
    for number, size in enumerate(SIZES)
]
PROMPTS = [
    "Describe it.",
    "A thing of red wool made for long walks and cold days, or of blue cotton?",
] * 3

Load = Callable[[int], Captioner]
NO_VLLM = "vLLM isn't installed: it needs an environment of its own (constraints-vllm.txt)"
VLLM = (
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason=NO_VLLM),
    pytest.mark.filterwarnings("ignore"),  # those of its libraries
)


def describe(number: int, request: ReceivedRequest) -> Reply:
    """The server's description: the photo's size, its mean colour and the prompt's first word."""
    photo = Image.open(io.BytesIO(base64.b64decode(request.jpeg.rpartition(",")[2])))
    prompt = request.prompt
    text = f"A thing of {photo.size}, {photo.resize((1, 1)).getpixel((0, 0))}, {prompt[:8]}"
    dialect = "openai" if "image_url" in request.parts[0] else "anthropic"
    return Reply(response_body(dialect, text, tokens=(len(prompt.split()), 8)))


@contextmanager
def endpoint(dialect: str) -> Iterator[Load]:
    """The batch size is the number of concurrent requests."""
    with pytest.MonkeyPatch.context() as environment, serving(dialect) as server:
        environment.setenv(VARIABLES[dialect], "none")
        environment.setenv("NO_PROXY", "127.0.0.1")
        server.script = describe

        def load(batch_size: int) -> Captioner:
            settings = {"dialect": dialect, "url": server.url, "concurrency": batch_size}
            model = {"backend": "endpoint", "endpoint": settings}
            return load_captioner(ModelSettings.model_validate(model))

        yield load


def short_answers(folder: Path, **options: object) -> ModelSettings:
    return ModelSettings(model=str(folder), max_new_tokens=8, **options)  # type: ignore[arg-type]


@contextmanager
def vllm(folder: Path) -> Iterator[Load]:
    """It has no batches, and takes a minute to load."""
    settings = short_answers(folder, backend="vllm")
    with pytest.MonkeyPatch.context() as environment:
        # GB. By default it takes half of the machine's memory on a CPU.
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        captioner = load_captioner(settings)
    assert isinstance(captioner, VllmCaptioner)
    yield lambda batch_size: captioner
    captioner.close()


BACKENDS = [
    "fake",
    "llava",
    "qwen",
    "compiled qwen",
    "endpoint openai",
    "endpoint anthropic",
    pytest.param("vllm llava", marks=VLLM),
    pytest.param("vllm qwen", marks=VLLM),
]


@pytest.fixture(scope="module", params=BACKENDS)
def load(request) -> Iterator[Load]:
    """A function from a batch size to the backend's captioner."""
    backend, _, model = request.param.rpartition(" ")
    if backend == "endpoint":
        with endpoint(model) as make:
            yield make
    elif backend == "vllm":
        with vllm(request.getfixturevalue(model)) as make:
            yield make
    else:
        settings = fake_settings("none")
        if model != "fake":
            folder = request.getfixturevalue(model)
            settings = short_answers(folder, torch_compile=backend == "compiled")
        yield lambda batch_size: load_captioner(settings, batch_size)


def test_a_caption_is_the_same_in_any_batch_and_any_order(load):
    batch = requests(PHOTOS, PROMPTS)
    captioner = load(1)
    alone = {request.key: caption_all(captioner, [request])[request.key] for request in batch}
    # Captions must differ, or this would show nothing.
    assert len({answer.text for answer in alone.values()}) > len(PHOTOS) / 2
    for batch_size in (3, 16):
        captioner = load(batch_size)
        assert caption_all(captioner, batch) == alone
        assert caption_all(captioner, batch[::-1]) == alone


def test_each_request_has_one_answer_and_is_reported_when_it_begins(load):
    captioner = load(3)
    begun = list[str]()
    captioner.on_begin = begun.extend
    batch = requests(PHOTOS, PROMPTS)
    for request in batch[:4]:
        captioner.add(request)
    answers = captioner.step()
    assert {answer.key for answer in answers} <= set(begun)
    for request in batch[4:]:
        captioner.add(request)
    while len(answers) < len(batch):
        answers += captioner.step()
    keys = [request.key for request in batch]
    assert sorted(answer.key for answer in answers) == keys
    assert sorted(begun) == keys
    assert captioner.max_in_flight >= captioner.batch_size >= 1


def test_tokens_are_counted_and_answers_stop_at_their_limit(load):
    pair = requests([PHOTOS[0]] * 2, ["Say.", "Say it all once more."])
    short, long = caption_all(load(2), pair).values()
    assert long.input_tokens - short.input_tokens == 4  # padding isn't counted
    assert 1 <= short.output_tokens <= 10
    assert short.text == " ".join((short.text or "").split())


@pytest.mark.parametrize(
    ("load", "model"),
    [
        pytest.param("vllm llava", "llava", marks=VLLM),
        pytest.param("vllm qwen", "qwen", marks=VLLM),
    ],
    indirect=["load"],
)
def test_vllm_answers_as_transformers_does_and_refuses_long_prompts(
    load: Load, model: str, request
):
    batch = requests(PHOTOS, PROMPTS)
    too_long = Request("long", PHOTOS[0], "word " * 600)
    answers = caption_all(load(1), [*batch[:3], too_long, *batch[3:]])
    refusal = answers.pop("long")
    assert (refusal.text, refusal.error_class) == (None, "bad_request")
    assert "maximum context length is 512 tokens" in (refusal.error or "")
    settings = short_answers(request.getfixturevalue(model))
    assert answers == caption_all(load_captioner(settings), batch)


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason=NO_VLLM)
def test_vllms_engine_ends_when_its_parent_is_killed(llava, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    supervisor = Supervisor(short_answers(llava, backend="vllm"), 16, 600)
    jpeg = encoded(PHOTOS[0], "JPEG")
    (result,) = supervisor.caption([Photo("one", jpeg, PROMPTS[0])])
    assert result.text
    assert supervisor.pid
    engine = psutil.Process(supervisor.pid).children(recursive=True)
    assert engine
    os.kill(supervisor.pid, signal.SIGKILL)
    assert psutil.wait_procs(engine, 10)[1] == []
    supervisor.close()


def test_vllm_refuses_the_packaged_model():
    with pytest.raises(
        ValueError, match="vLLM doesn't read the packaged model's weights: name another model"
    ):
        ModelSettings(backend="vllm")


@pytest.mark.skipif(bool(importlib.util.find_spec("vllm")), reason="vLLM is installed")
def test_without_vllm_its_backend_says_how_to_install_it(llava):
    with pytest.raises(
        UsageError, match=r"No module named 'vllm'.*pip install .*vllm.* -c constraints-vllm\.txt"
    ):
        load_captioner(ModelSettings(backend="vllm", model=str(llava)))


# Batches


class RecordingCaptioner(BatchCaptioner):
    """Records its batches. It fails on more than `max_size` photos and on the width `bad_width`."""

    def __init__(
        self,
        batch_size: int,
        max_size: int = 99,
        bad_width: int = 0,
    ):
        super().__init__(batch_size)
        self.max_size = max_size
        self.bad_width = bad_width
        self.batches = list[list[str]]()

    def describe(self, batch: Sequence[Request]) -> list[Answer]:
        self.batches.append([request.key for request in batch])
        if len(batch) > self.max_size:
            raise MemoryError("no room")
        if any(request.image.width == self.bad_width for request in batch):
            raise ValueError("a bad width")
        return [Answer(request.key, "Fine.") for request in batch]

    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


def wide(*widths: int) -> list[Request]:
    return requests([Image.new("RGB", (width, 10)) for width in widths], "Say it.")


def test_photos_of_similar_size_go_together_and_the_oldest_goes_first():
    captioner = RecordingCaptioner(2)
    caption_all(captioner, wide(10, 90, 11, 91, 50))
    assert captioner.batches == [["0", "2"], ["1", "3"], ["4"]]


def test_batches_are_halved_when_memory_runs_out_and_grow_again():
    captioner = RecordingCaptioner(8, max_size=3)
    answers = caption_all(captioner, wide(*[10] * 40))
    assert {answer.text for answer in answers.values()} == {"Fine."}
    assert captioner.sizes() == [8, 4] + [2] * 16 + [4] + [2] * 4
    captioner.max_size = 99
    captioner.batches = []
    caption_all(captioner, wide(*[10] * 200))
    sizes = captioner.sizes()
    assert sizes == [*sorted(sizes)[:-1], sizes[-1]]
    assert max(sizes) == 8


def test_a_photo_that_does_not_fit_alone_is_an_error():
    answers = caption_all(RecordingCaptioner(4, max_size=0), wide(10, 10))
    assert {answer.error_class for answer in answers.values()} == {"out_of_memory"}


def test_a_failed_batch_is_retried_photo_by_photo():
    captioner = RecordingCaptioner(4, bad_width=11)
    answers = list(caption_all(captioner, wide(11, 10, 10, 10, 10)).values())
    assert answers[0] == Answer("0", None, error_class="ValueError", error="a bad width")
    assert [answer.text for answer in answers[1:]] == ["Fine."] * 4
    assert captioner.sizes() == [4, 1, 1, 1, 1, 1]


# The fake


RED_TEXT = "A thing of red 6, green 0 and blue 0."
GREEN_TEXT = "A thing of red 0, green 6 and blue 0."
BLUE_TEXT = "A thing of red 0, green 0 and blue 6."


def fake(instructions: str) -> Captioner:
    return load_captioner(fake_settings(instructions))


def fake_errors(instructions: str, *photos: Image.Image) -> list[str | None]:
    """The error classes, in order."""
    answers = caption_all(fake(instructions), requests(photos, "Say it."))
    return [answer.error_class for answer in answers.values()]


def test_the_fake_describes_the_mean_colour():
    answers = caption_all(fake("demo"), requests([RED, BLUE], ["Say it.", "And this one?"]))
    assert list(answers.values()) == [Answer("0", RED_TEXT, 2, 10), Answer("1", BLUE_TEXT, 3, 10)]


def test_the_fake_answers_in_json_with_a_schema():
    captioner = load_captioner(fake_settings("empty:blue"), json_schema=SCHEMA)
    red, blue = texts(captioner, [RED, BLUE])
    colour = "red 6, green 0 and blue 0"
    assert parse_attributes(red).non_empty == {"kind": "thing", "colour": colour}
    assert blue == ""


def test_the_fake_raises_on_request():
    (answer,) = caption_all(fake("raise"), requests([RED], "Say it.")).values()
    error = "the fake was asked to fail on this photo"
    assert answer == Answer("0", None, error_class="RuntimeError", error=error)
    assert fake_errors("raise", RED, GREEN, BLUE) == ["RuntimeError", None, None]
    assert fake_errors("raise:green", RED, GREEN) == [None, "RuntimeError"]
    assert fake_errors("fits=0", GREEN) == ["out_of_memory"]


def test_the_fakes_texts_on_request():
    assert texts(fake("raise+empty"), [GREEN, BLUE]) == [GREEN_TEXT, ""]
    assert texts(fake("raise"), [GREEN, BLUE]) == [GREEN_TEXT, BLUE_TEXT]
    photos = [GREEN, BLUE, RED]
    echo, refusal, loop = texts(fake("echo:green+refuse:blue+loop:red"), photos, "Say it now.")
    assert echo == "Say it now."
    assert refusal.startswith("I'm sorry, I")
    assert loop == 9 * RED_TEXT


def test_the_fake_counts_its_photos(tmp_path):
    texts(fake(f"count={tmp_path / 'calls'}+empty"), [RED, GREEN, BLUE])
    assert (tmp_path / "calls").read_text() == "1\n1\n1\n"


# Ids


def model_id(model: object) -> str:
    return ModelSettings(model=str(model)).model_id()


def test_ids_of_the_fake_and_of_the_packaged_model():
    assert fake_settings("raise").model_id() == "fake-raise@1"
    name, _, digest = ModelSettings().model_id().partition("@")
    assert (name, len(digest)) == ("packaged", 12)


def test_the_id_depends_on_weights_and_template_and_not_on_card_or_folder(tmp_path, llava):
    copy = shutil.copytree(llava, tmp_path / "elsewhere" / llava.name)
    before = model_id(llava)
    assert before.startswith("untrained@")
    (copy / "README.md").write_text("A card.")
    (copy / "curve.png").write_bytes(b"A picture.")
    assert model_id(copy) == before
    with (copy / "chat_template.jinja").open("a") as template:
        template.write(" ")
    other_template = model_id(copy)
    with (copy / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    assert len({before, other_template, model_id(copy)}) == 3


def test_the_id_does_not_depend_on_what_runs_the_model(llava):
    assert ModelSettings(backend="vllm", model=str(llava)).model_id() == model_id(llava)


def test_a_missing_folder_names_the_key_and_the_remedy(tmp_path):
    message = r"^caption\.model\.model: there is no model folder .*/gone\. Give a folder"
    with pytest.raises(UsageError, match=message):
        model_id(tmp_path / "gone")


# Folders


def test_pickled_weights_are_not_loaded(llava, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(llava, folder)
    (folder / "extra").mkdir()
    weights = (folder / "model.safetensors").rename(folder / "extra" / "model.safetensors")
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_captioner(ModelSettings(model=str(folder)))


# The packaged model


def test_the_packaged_model_is_small_enough_to_ship_and_has_its_card():
    assert (
        0 < sum(file.stat().st_size for file in PACKAGED_MODEL.glob("*.safetensors")) <= 25_000_000
    )
    card = set((PACKAGED_MODEL / "README.md").read_text().lower().split())
    assert {"kind", "colour", "pattern", "material", "audience", "seed", "licence"} <= card


def test_captions_come_from_the_photos():
    truth, _ = fresh()
    predicted = [extract_attributes(text, ATTRIBUTES) for text in described()]
    for name in ATTRIBUTES:
        pairs = zip(predicted, truth, strict=True)
        accuracy = np.mean([prediction.get(name) == true[name] for prediction, true in pairs])
        assert accuracy >= 0.95, f"{name}: {accuracy:.2f}"


def test_a_blank_photo_gives_no_information():
    truth, _ = fresh()
    (text,) = texts(packaged(), [BLANK])
    prediction = extract_attributes(text, ATTRIBUTES)
    # Chance is .125, .125, .2 and .25.
    names = ("kind", "colour", "pattern", "material")
    correct = [prediction.get(name) == true[name] for name in names for true in truth]
    assert np.mean(correct) < 0.35


def test_a_caption_does_not_depend_on_its_batch():
    photos = fresh()[1][:6]
    for size in (1, 3):
        batches = [photos[start : start + size] for start in range(0, 6, size)]
        captions = [text for batch in batches for text in texts(packaged(), batch)]
        assert captions == described()[:6]


@pytest.mark.parametrize(
    "prompt",
    ["Is this a red striped cotton shirt in a sporty style?", "Say <image> or nothing. " * 40],
)
def test_the_packaged_model_ignores_prompts(prompt: str):
    assert texts(packaged(), fresh()[1][:16], prompt) == described()[:16]
