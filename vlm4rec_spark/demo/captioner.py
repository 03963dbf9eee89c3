"""Trains the packaged captioner on renderings: `python -m vlm4rec_spark.demo.captioner`.

A LLaVA of CLIP vision tower, projector and small Llama, made of ordinary transformers classes. Seeded; renderings are
drawn once into a cache; training goes on from its last checkpoint. Knows nothing of the demo's shop.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlm4rec_spark.demo import card
from vlm4rec_spark.demo.drawing import ATTRIBUTES, draw, parse, sentence

SIDE, PATCH, WIDTH = 128, 16, 192
TRAIN_SEED, TEST_SEED = 1_000_000, 2_000_000
"""First seeds of the training and held-out renderings; the demo's shop draws from below a million."""
COMMAND = "python -m vlm4rec_spark.demo.captioner"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer :{% endif %}"
)


def render(seed: int) -> tuple[dict[str, str], Image.Image]:
    rng = np.random.default_rng(seed)
    attributes = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
    return attributes, draw(attributes, rng)


def _render_small(seed: int) -> tuple[list[int], np.ndarray]:
    attributes, photo = render(seed)
    labels = [values.index(attributes[name]) for name, values in ATTRIBUTES.items()]
    return labels, np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def renderings(cache: Path, count: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 photos (count, SIDE, SIDE, 3) and labels (count, attributes); drawn once, then read from `cache`."""
    if not cache.exists():
        started = time.monotonic()
        photos, labels = np.empty((count, SIDE, SIDE, 3), np.uint8), np.empty((count, len(ATTRIBUTES)), np.int64)
        with ProcessPoolExecutor(workers) as pool:
            seeds = range(TRAIN_SEED, TRAIN_SEED + count)
            for i, (label, photo) in enumerate(pool.map(_render_small, seeds, chunksize=200)):
                photos[i], labels[i] = photo, label
                if (i + 1) % 2_000 == 0:
                    rate = (i + 1) / (time.monotonic() - started)
                    print(f"drawn {i + 1:,} of {count:,}, {rate:.0f}/s, {(count - i) / rate:.0f} s left", flush=True)
        np.savez(cache, photos=photos, labels=labels)
    with np.load(cache) as stored:
        return stored["photos"], stored["labels"]


def build():  # type: ignore[no-untyped-def]
    """An untrained model and its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    first = {name: values[0] for name, values in ATTRIBUTES.items()}
    said = " ".join(sentence(first | {name: value}) for name, values in ATTRIBUTES.items() for value in values)
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for word, _ in splitter.pre_tokenize_str(said)} | {"answer", ":"})
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: place for place, word in enumerate(special + words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left", clean_up_tokenization_spaces=True,
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=5, num_attention_heads=6,
            image_size=SIDE, patch_size=PATCH, projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=4, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    return model, processor


def train(out: Path, work: Path, steps: int, batch: int, count: int, seed: int) -> float:
    """Train and save to `out`; checkpoints and renderings lie in `work`. Returns the core-minutes that it took."""
    spent = -_core_seconds()
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    photos, labels = renderings(work / f"renderings-{count}.npz", count, workers=2)
    model, processor = build()
    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, len(values)) for values in ATTRIBUTES.values())
    everything = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(everything, lr=1e-3, weight_decay=0.02)
    cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = cycle(optimiser, 1e-3, total_steps=steps, pct_start=0.1)
    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        spent += state["spent"]
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimiser.load_state_dict(state["optimiser"])
        if first < state["schedule"]["total_steps"]:
            schedule.load_state_dict(state["schedule"])
        else:  # more steps than were asked for before: another, gentler cycle
            schedule = cycle(optimiser, 4e-4, total_steps=steps - first, pct_start=0.1)
        print(f"going on from step {first}", flush=True)
    answers = [_answer(processor, row) for row in labels]
    started = time.monotonic()
    for step in range(first, steps):
        rng = np.random.default_rng([seed, step])
        rows = rng.integers(0, count, batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss, looked = _loss(model, heads, processor, _pixels(photos[rows], rng), labels[rows],
                                 [answers[row] for row in rows], rng)  # fmt: skip
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - first) / (time.monotonic() - started)
            print(f"step {step + 1}/{steps}, loss {loss.item():.3f}, seen right {looked:.2f}, "
                  f"{rate * batch:.0f} photos/s, {(steps - step) / rate / 60:.0f} min left", flush=True)  # fmt: skip
        if (step + 1) % 100 == 0:
            parts = {"model": model, "heads": heads, "optimiser": optimiser, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"step": step + 1, "spent": spent + _core_seconds()}, checkpoint)
    model.eval().half().save_pretrained(out)
    processor.save_pretrained(out)
    return (spent + _core_seconds()) / 60


def _core_seconds() -> float:
    """Processor time of this process and of the children that drew: other programs' load doesn't lengthen it."""
    return sum(os.times()[:4])


def _answer(processor, labels: Sequence[int]) -> list[int]:  # type: ignore[no-untyped-def]
    attributes = {name: values[label] for (name, values), label in zip(ATTRIBUTES.items(), labels, strict=True)}
    return [*processor.tokenizer(sentence(attributes), add_special_tokens=False)["input_ids"], 2]


def _pixels(photos: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Normalised photos, half of them mirrored, each shifted by up to 5 px and a little brighter or darker."""
    mirrored = np.where(rng.random((len(photos), 1, 1, 1)) < 0.5, photos, photos[:, :, ::-1])
    shifted = np.stack([np.roll(photo, rng.integers(-5, 6, 2), (0, 1)) for photo in mirrored])
    scaled = shifted.astype(np.float32) * rng.uniform(0.92, 1.08, (len(photos), 1, 1, 1)).astype(np.float32)
    return torch.from_numpy(scaled / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def _loss(model, heads, processor, pixels, labels, answers, rng):  # type: ignore[no-untyped-def]
    """Loss of the answer's words and of linear heads on the pooled tower, and how often the heads are right.

    The heads only teach the tower what to look for; they aren't saved. The prompt is a random number of unknown
    words with random words of the vocabulary among them, so that the answer depends on the photo and on nothing else.
    """
    vocabulary = processor.tokenizer.convert_tokens_to_ids
    asked = rng.integers(4, 140 if rng.random() < 0.1 else 60)
    words = rng.integers(vocabulary("<image>") + 1, len(processor.tokenizer), (len(answers), asked))
    words[rng.random(words.shape) > rng.uniform(0, 0.6)] = vocabulary("<unk>")
    image, end = [vocabulary("<image>")] * (SIDE // PATCH) ** 2, [vocabulary("answer"), vocabulary(":")]
    before, longest = len(image) + asked + len(end), max(map(len, answers))
    ids = torch.tensor(
        [image + row + end + answer + [0] * (longest - len(answer))
         for row, answer in zip(words.tolist(), answers, strict=True)]
    )  # fmt: skip
    target = ids.clone()
    target[:, :before] = -100
    target[target == 0] = -100
    seen = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    embedded = model.get_input_embeddings()(ids)
    features = model.model.multi_modal_projector(seen)
    embedded = torch.cat([features.to(embedded.dtype), embedded[:, features.shape[1] :]], dim=1)
    hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state[:, before - 1 : -1]
    said = model.lm_head(hidden).float()
    loss = torch.nn.functional.cross_entropy(said.flatten(0, 1), target[:, before:].flatten(), ignore_index=-100)
    pooled, truth, right = seen.float().mean(dim=1), torch.from_numpy(labels), 0.0
    for place, head in enumerate(heads):
        guess = head(pooled)
        loss = loss + 0.3 * torch.nn.functional.cross_entropy(guess, truth[:, place])
        right += (guess.argmax(dim=1) == truth[:, place]).float().mean().item() / len(heads)
    return loss, right


def held_out(model: Path, count: int) -> tuple[dict[str, float], dict[str, float]]:
    """Share of fresh renderings whose generated caption names each attribute rightly; the same on blank photos."""
    from vlm4rec_spark.models.captioners import Request, answers
    from vlm4rec_spark.models.captioners.transformers import TransformersCaptioner
    from vlm4rec_spark.models.prompts import load_prompt

    captioner, prompt = TransformersCaptioner(str(model), "main", 40, 32), load_prompt("describe.1").text

    def seen(photos: Sequence[Image.Image]) -> list[dict[str, str]]:
        requests = [Request(str(place), photo, prompt) for place, photo in enumerate(photos)]
        return [parse(answer.text or "") for answer in answers(captioner, requests).values()]

    drawn = [render(seed) for seed in range(TEST_SEED, TEST_SEED + count)]
    (blank,) = seen([Image.new("RGB", (224, 224), (160, 160, 160))])
    found = seen([photo for _, photo in drawn])
    share = {n: sum(f.get(n) == a[n] for f, (a, _) in zip(found, drawn, strict=True)) / count for n in ATTRIBUTES}
    return share, {n: sum(blank.get(n) == a[n] for a, _ in drawn) / count for n in ATTRIBUTES}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    options.add_argument("--work", type=Path, default=Path("captioner-training"))
    options.add_argument("--steps", type=int, default=3_000)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--renderings", type=int, default=40_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--test", type=int, default=3_000)
    given = options.parse_args()
    minutes = train(given.out, given.work, given.steps, given.batch, given.renderings, given.seed)
    share, blank = held_out(given.out, given.test)
    command = f"{COMMAND} --steps {given.steps} --batch {given.batch} --renderings {given.renderings}"
    training = card.Training(command, given.seed, given.steps, given.batch, given.renderings, TRAIN_SEED, minutes)
    card.write(given.out, training, card.HeldOut(given.test, TEST_SEED, share, blank))
    print(f"{'attribute':10} {'fresh':>6} {'blank':>6} {'chance':>6}")
    for name, values in ATTRIBUTES.items():
        print(f"{name:10} {share[name]:6.3f} {blank[name]:6.3f} {1 / len(values):6.3f}")


if __name__ == "__main__":
    main()
