"""Captioners: the contract of every backend, the fake's faults, a model's id, and the packaged one's eyes."""

from __future__ import annotations

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
from loopback import VARIABLES, Reply, Seen, said, serving
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models

from vlm4rec_spark.demo.drawing import ATTRIBUTES, SIZE, parse, render
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.attributes import SCHEMA
from vlm4rec_spark.models.captioning.attributes import parse as parse_attributes
from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.backends.vllm import VllmCaptioner
from vlm4rec_spark.models.captioning.captioner import (
    PACKAGED_MODEL,
    Answer,
    Captioner,
    ModelSettings,
    Request,
    answers,
    load_captioner,
)
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.models.captioning.supervisor import Photo, Supervisor
from vlm4rec_spark.training.network import build

FRESH_SEED = 3_000_000
"""Neither the training, nor its held-out renderings, nor the shop come near these seeds."""
PROMPT = load_prompt("describe.1").text
RED, GREEN, BLUE = (
    Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))
)
BLANK = Image.new("RGB", (SIZE, SIZE), (160, 160, 160))


@cache
def packaged() -> Captioner:
    return load_captioner(ModelSettings())


@cache
def fresh() -> tuple[list[dict[str, str]], list[Image.Image]]:
    """The true attributes and the photos of 64 renderings that no model has seen."""
    attributes, photos = zip(*(render(FRESH_SEED + number) for number in range(64)), strict=True)
    return list(attributes), list(photos)


def _nonsense(model: torch.nn.Module) -> None:
    """As they are drawn, weights are so small that the model only repeats the prompt's last word."""
    for weights in model.parameters():
        weights.data *= 8 if weights.ndim > 1 else 1


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of random weights in a folder: it says nonsense, another nonsense for each photo and prompt."""
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
    model, processor = build([*PROMPTS, *NONSENSE], tower, ASKING)
    _nonsense(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # As published models name them, and as vLLM reads them; newer transformers read both and write the shorter name.
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): each
        for name, each in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


NONSENSE = ["A soft warm thing.", "Say it all once more, in a rustic style."]
ASKING = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer{% endif %}"
)
QWEN_TEMPLATE = """
{%- for message in messages %}<|im_start|> {{ message['role'] }} {% for part in message['content'] -%}
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part['text'] }} {% endif %}
{%- endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Qwen2.5-VL's kind, as nonsensical: photos of any size take any number of tokens, places have three axes."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    ends = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    seen = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = sorted(set(" ".join(["user assistant made warm soft", *PROMPTS]).split()))
    vocabulary = {word: place for place, word in enumerate(ends + seen + words)}
    core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[ends[1], *seen],
    )
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(
            patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=112 * 112
        ),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(vocabulary),
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
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.repetition_penalty = 1.3  # the published models have one too
    _nonsense(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def requests(photos: Sequence[Image.Image], prompts: Sequence[str]) -> list[Request]:
    return [
        Request(str(n), photo, prompt)
        for n, (photo, prompt) in enumerate(zip(photos, prompts, strict=True))
    ]


def captions(
    captioner: Captioner, photos: Sequence[Image.Image], batch: int, prompt: str = PROMPT
) -> list[str]:
    """One after another in batches of this size, whatever size the captioner was made for."""
    found: list[str] = []
    for start in range(0, len(photos), batch):
        part = photos[start : start + batch]
        found += [
            answer.text or ""
            for answer in answers(captioner, requests(part, [prompt] * len(part))).values()
        ]
    return found


@cache
def described() -> list[str]:
    return captions(packaged(), fresh()[1], 16)


# The contract, of every backend


SIZES = [(40, 70), (70, 40), (64, 64), (120, 30), (64, 64), (70, 40)]
PHOTOS = [
    Image.fromarray(np.random.default_rng(n).integers(0, 256 - 40 * n, (*size, 3), np.uint8))
    for n, size in enumerate(SIZES)
]
PROMPTS = [
    "Describe it.",
    "A thing of red wool made for long walks and cold days, or of blue cotton?",
] * 3

Load = Callable[[int], Captioner]
NO_VLLM = "vLLM isn't installed: it needs an environment of its own (constraints-vllm.txt)"
VLLM = (
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason=NO_VLLM),
    pytest.mark.filterwarnings("ignore"),  # the libraries that it brings
)


def _describe(number: int, seen: Seen) -> Reply:
    """What a server says of a photo: its size, its mean colour, and which prompt it was."""
    photo = Image.open(io.BytesIO(base64.b64decode(seen.jpeg.rpartition(",")[2])))
    prompt = seen.parts[1]["text"]
    text = f"A thing of {photo.size}, {photo.resize((1, 1)).getpixel((0, 0))}, {prompt[:8]}"
    return Reply(
        said(
            "openai" if "image_url" in seen.parts[0] else "anthropic",
            text,
            tokens=(len(prompt.split()), 8),
        )
    )


@contextmanager
def endpoint(dialect: str) -> Iterator[Load]:
    """Its batch is how many requests are on their way at once."""
    with pytest.MonkeyPatch.context() as environment, serving(dialect) as server:
        environment.setenv(VARIABLES[dialect], "none")
        environment.setenv("NO_PROXY", "127.0.0.1")
        server.script = _describe
        asked = {"dialect": dialect, "url": server.url}
        yield lambda batch_size: load_captioner(
            ModelSettings.model_validate(
                {"backend": "endpoint", "endpoint": asked | {"concurrency": batch_size}}
            )
        )


@contextmanager
def vllm(folder: Path) -> Iterator[Load]:
    """It has no batches, and takes a minute to load."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(
            "VLLM_CPU_KVCACHE_SPACE", "1"
        )  # GB; on a CPU it takes half of the machine's otherwise
        captioner = load_captioner(
            ModelSettings(backend="vllm", model=str(folder), max_new_tokens=8)
        )
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
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """A function from a batch size to the backend's captioner."""
    backend, _, model = request.param.rpartition(" ")
    if backend == "endpoint":
        with endpoint(model) as make:
            yield make
    elif backend == "vllm":
        with vllm(request.getfixturevalue(model)) as make:
            yield make
    else:
        settings = ModelSettings(backend="fake", model="none")
        if model != "fake":
            folder, torch_compile = str(request.getfixturevalue(model)), backend == "compiled"
            settings = ModelSettings(model=folder, max_new_tokens=8, torch_compile=torch_compile)
        yield lambda batch_size: load_captioner(settings, batch_size)


def test_a_caption_is_the_same_in_any_batch_and_any_order(load: Load) -> None:
    asked, one = requests(PHOTOS, PROMPTS), load(1)
    alone = {request.key: answers(one, [request])[request.key] for request in asked}
    # Photo and prompt both matter, or this would show nothing.
    assert len({answer.text for answer in alone.values()}) > len(PHOTOS) / 2
    for batch_size in (3, 16):
        captioner = load(batch_size)
        assert answers(captioner, asked) == alone
        assert answers(captioner, asked[::-1]) == alone


def test_each_request_has_one_answer_and_its_work_is_announced(load: Load) -> None:
    captioner, begun = load(3), list[str]()
    captioner.begins = begun.extend
    asked, found = requests(PHOTOS, PROMPTS), list[Answer]()
    for place, one in enumerate(asked):
        captioner.add(one)
        if place == 3:
            found += captioner.step()
            assert {answer.key for answer in found} <= set(begun)
    while len(found) < len(asked):
        found += captioner.step()
    assert sorted(answer.key for answer in found) == sorted(one.key for one in asked)
    assert sorted(begun) == sorted(one.key for one in asked)
    assert captioner.at_once >= captioner.batch >= 1


def test_tokens_are_counted_and_answers_stop_at_the_bound(load: Load) -> None:
    short, long = answers(
        load(2), requests([PHOTOS[0]] * 2, ["Say.", "Say it all once more."])
    ).values()
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
def test_vllm_says_what_transformers_says_and_refuses_what_is_too_long(
    load: Load, model: str, request: pytest.FixtureRequest
) -> None:
    asked, too_long = requests(PHOTOS, PROMPTS), Request("long", PHOTOS[0], "word " * 600)
    said = answers(load(1), [*asked[:3], too_long, *asked[3:]])
    refused = said.pop("long")
    assert (refused.text, refused.error_class) == (None, "bad_request")
    assert "maximum context length is 512 tokens" in (refused.error or "")
    settings = ModelSettings(model=str(request.getfixturevalue(model)), max_new_tokens=8)
    assert said == answers(load_captioner(settings), asked)


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason=NO_VLLM)
def test_vllms_engine_ends_when_the_process_before_it_is_killed(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    supervisor = Supervisor(
        ModelSettings(backend="vllm", model=str(llava), max_new_tokens=8), 16, 600
    )
    jpeg = io.BytesIO()
    PHOTOS[0].save(jpeg, "JPEG")
    (result,) = supervisor.caption([Photo("one", jpeg.getvalue(), PROMPTS[0])])
    assert result.text
    assert supervisor.pid
    engine = psutil.Process(supervisor.pid).children(recursive=True)
    assert engine
    os.kill(supervisor.pid, signal.SIGKILL)
    assert psutil.wait_procs(engine, 10)[1] == []
    supervisor.close()


def test_vllm_is_refused_the_packaged_model() -> None:
    with pytest.raises(
        ValueError, match="vLLM doesn't read the packaged model's weights: name another model"
    ):
        ModelSettings(backend="vllm")


@pytest.mark.skipif(bool(importlib.util.find_spec("vllm")), reason="vLLM is installed")
def test_without_vllm_its_backend_says_how_to_install_it(llava: Path) -> None:
    with pytest.raises(
        UsageError, match=r"No module named 'vllm'.*pip install .*vllm.* -c constraints-vllm\.txt"
    ):
        load_captioner(ModelSettings(backend="vllm", model=str(llava)))


# What batches are made of


class Sized(BatchCaptioner):
    """Notes the batches; `fits` photos at a time, and no photo of the width `bad`."""

    def __init__(self, batch_size: int, fits: int = 99, bad: int = 0):
        super().__init__(batch_size)
        self.fits, self.bad, self.batches = fits, bad, list[list[str]]()

    def describe(self, batch: Sequence[Request]) -> list[Answer]:
        self.batches.append([request.key for request in batch])
        if len(batch) > self.fits:
            raise MemoryError("no room")
        if any(request.image.width == self.bad for request in batch):
            raise ValueError("a width that it can't take")
        return [Answer(request.key, "Fine.") for request in batch]


def wide(*widths: int) -> list[Request]:
    return requests([Image.new("RGB", (width, 10)) for width in widths], ["Say it."] * len(widths))


def test_photos_of_a_size_go_together_and_the_oldest_goes_first() -> None:
    captioner = Sized(2)
    answers(captioner, wide(10, 90, 11, 91, 50))
    assert captioner.batches == [["0", "2"], ["1", "3"], ["4"]]


def test_batches_are_halved_when_memory_runs_out_and_grow_again() -> None:
    captioner = Sized(8, fits=3)
    assert {answer.text for answer in answers(captioner, wide(*[10] * 40)).values()} == {"Fine."}
    assert [len(batch) for batch in captioner.batches] == [8, 4] + [2] * 16 + [4] + [2] * 4
    captioner.fits, captioner.batches = 99, []
    answers(captioner, wide(*[10] * 200))
    sizes = [len(batch) for batch in captioner.batches]
    assert sizes == [*sorted(sizes)[:-1], sizes[-1]]
    assert max(sizes) == 8


def test_memory_that_is_short_for_one_photo_is_its_error() -> None:
    found = answers(Sized(4, fits=0), wide(10, 10))
    assert {answer.error_class for answer in found.values()} == {"out_of_memory"}


def test_what_a_batch_fails_on_is_found_one_by_one_and_costs_no_other() -> None:
    captioner = Sized(4, bad=11)
    found = answers(captioner, wide(11, 10, 10, 10, 10))
    assert {key: answer.error_class for key, answer in found.items()} == {
        "0": "ValueError",
        "1": None,
        "2": None,
        "3": None,
        "4": None,
    }
    assert found["0"].error == "a width that it can't take"
    assert [len(batch) for batch in captioner.batches] == [4, 1, 1, 1, 1, 1]


# The fake


def fake(faults: str) -> Captioner:
    return load_captioner(ModelSettings(backend="fake", model=faults))


def faked(faults: str, photos: Sequence[Image.Image], prompt: str = "Say it.") -> list[Answer]:
    return list(answers(fake(faults), requests(photos, [prompt] * len(photos))).values())


def test_the_fake_says_the_mean_colour() -> None:
    assert list(
        answers(fake("demo"), requests([RED, BLUE], ["Say it.", "And this one?"])).values()
    ) == [
        Answer("0", "A thing of red 6, green 0 and blue 0.", 2, 10),
        Answer("1", "A thing of red 0, green 0 and blue 6.", 3, 10),
    ]


def test_the_fake_says_it_in_json_where_that_is_asked_for() -> None:
    captioner = load_captioner(
        ModelSettings(backend="fake", model="empty:blue"), json_schema=SCHEMA
    )
    asked = [
        answer.text or ""
        for answer in answers(captioner, requests([RED, BLUE], ["Say it."] * 2)).values()
    ]
    assert parse_attributes(asked[0]).known == {
        "kind": "thing",
        "colour": "red 6, green 0 and blue 0",
    }
    assert asked[1] == ""


def test_the_fake_fails_on_request_and_only_then() -> None:
    failed, fine = faked("raise", [RED, GREEN])
    assert (failed.text, failed.error_class, failed.error) == (
        None,
        "RuntimeError",
        "the fake was asked to fail on this photo",
    )
    assert fine.text == "A thing of red 0, green 6 and blue 0."
    assert [answer.error_class for answer in faked("raise:green", [RED, GREEN])] == [
        None,
        "RuntimeError",
    ]
    assert faked("raise", [GREEN, BLUE]) == faked("demo", [GREEN, BLUE])
    assert captions(fake("raise+empty"), [GREEN, BLUE], 2) == [
        "A thing of red 0, green 6 and blue 0.",
        "",
    ]
    asked = [
        answer.text or ""
        for answer in faked("echo:green+refuse:blue+loop:red", [GREEN, BLUE, RED], "Say it now.")
    ]
    assert [text[:12] for text in asked] == ["Say it now.", "I'm sorry, I", "A thing of r"]
    assert len(asked[2]) == 9 * len("A thing of red 6, green 0 and blue 0.")
    assert [answer.text is None for answer in faked("fits=0", [GREEN])] == [True]


def test_the_fake_counts_the_photos_it_is_asked_about(tmp_path: Path) -> None:
    captions(fake(f"count={tmp_path / 'calls'}+empty"), [RED, GREEN, BLUE], 2)
    assert (tmp_path / "calls").read_text() == "1\n1\n1\n"


# Ids


def test_ids_of_the_fake_and_of_the_packaged_model() -> None:
    assert ModelSettings(backend="fake", model="raise").model_id() == "fake-raise@1"
    name, _, digest = ModelSettings().model_id().partition("@")
    assert (name, len(digest)) == ("packaged", 12)


def test_the_id_changes_with_the_weights_and_the_template_and_not_with_the_card_or_place(
    tmp_path: Path, llava: Path
) -> None:
    copy = shutil.copytree(llava, tmp_path / "elsewhere" / llava.name)
    before = ModelSettings(model=str(llava)).model_id()
    assert before.startswith("untrained@")
    (copy / "README.md").write_text("A card.")
    (copy / "curve.png").write_bytes(b"A picture.")
    assert ModelSettings(model=str(copy)).model_id() == before
    with (copy / "chat_template.jinja").open("a") as template:
        template.write(" ")
    other_template = ModelSettings(model=str(copy)).model_id()
    with (copy / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    assert len({before, other_template, ModelSettings(model=str(copy)).model_id()}) == 3


def test_the_id_does_not_depend_on_what_runs_the_model(llava: Path) -> None:
    assert (
        ModelSettings(backend="vllm", model=str(llava)).model_id()
        == ModelSettings(model=str(llava)).model_id()
    )


def test_a_folder_that_is_not_there_names_the_key_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        ModelSettings(model=f"{tmp_path}/gone").model_id()
    assert str(refused.value) == (
        f"caption.model.model: there is no model folder {tmp_path}/gone. Give a folder that exists or a hub name."
    )


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(
        UsageError, match=r"^caption\.model\.model: the folder .* holds no \.safetensors file\."
    ):
        ModelSettings(model=str(tmp_path)).model_id()


# Folders


def test_pickled_weights_beside_others_are_not_loaded(llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(llava, folder)
    (folder / "extra").mkdir()
    weights = (folder / "model.safetensors").rename(folder / "extra" / "model.safetensors")
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_captioner(ModelSettings(model=str(folder)))


# The packaged model


def test_the_packaged_model_is_small_enough_to_ship_and_has_its_card() -> None:
    assert (
        0 < sum(file.stat().st_size for file in PACKAGED_MODEL.glob("*.safetensors")) <= 25_000_000
    )
    words = set((PACKAGED_MODEL / "README.md").read_text().lower().split())
    assert {"kind", "colour", "pattern", "material", "audience", "seed", "licence"} <= words


def test_captions_come_from_the_photos() -> None:
    truth, _ = fresh()
    found = [parse(text) for text in described()]
    for name in ATTRIBUTES:
        right = np.mean(
            [seen.get(name) == true[name] for seen, true in zip(found, truth, strict=True)]
        )
        assert right >= 0.95, f"{name}: {right:.2f}"


def test_a_blank_photo_tells_the_model_nothing() -> None:
    truth, _ = fresh()
    blank = parse(captions(packaged(), [BLANK], 1)[0])
    # Chance is .125, .125, .2 and .25.
    right = [
        [blank.get(name) == true[name] for true in truth]
        for name in ("kind", "colour", "pattern", "material")
    ]
    assert np.mean(right) < 0.35


def test_a_caption_does_not_depend_on_its_batch() -> None:
    photos = fresh()[1][:16]
    assert captions(packaged(), photos, 1) == described()[:16]
    assert captions(packaged(), photos, 3) == described()[:16]


def test_no_prompt_leads_the_packaged_model_astray() -> None:
    photos = fresh()[1][:16]
    assert (
        captions(packaged(), photos, 16, "Is this a red striped cotton shirt in a sporty style?")
        == described()[:16]
    )
    assert captions(packaged(), photos, 16, "Say <image> or nothing. " * 40) == described()[:16]
