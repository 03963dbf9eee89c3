"""Trains a captioner: photos and sentences in, a folder that transformers loads out.

Seeded, resumable.

The decoder learns the sentences. Linear heads on the pooled tower learn the attributes. They only
guide the tower and aren't saved.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.training import network
from vlm4rec_spark.training.augment import augment, plain
from vlm4rec_spark.training.labelled import Labelled

_SAVE_SECONDS = 120
_LOG_SECONDS = 15
_VALIDATIONS = 20
_VALIDATION_PHOTOS = 1_000
"""How often, and on how many held-out photos: it takes time from the training."""
_RATE = 1e-3
"""The highest learning rate."""
_WARM_UP = 0.06
_HEAD_WEIGHT = 0.5
"""Of the heads' losses; the sentence's loss has 1."""
_SMOOTHING = 0.1


@dataclass(frozen=True)
class TrainingPlan:
    """How long a training takes, and its settings."""

    seen: int
    """Photos over all. A photo is seen several times, differently augmented."""
    batch: int
    seed: int


@dataclass(frozen=True)
class Point:
    """A point of the curve."""

    seen: int
    """Photos seen."""
    loss: float
    right: dict[str, float]
    """Accuracy of the heads on held-out photos."""


class Training(NamedTuple):
    """What a training was."""

    plan: TrainingPlan
    curve: list[Point]
    seconds: float
    device: str
    """For people."""


class _Learner(torch.nn.Module):
    """The captioner with the parts that only the training needs."""

    def __init__(
        self,
        model: Any,
        labelled: Labelled,
    ):
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        heads = {
            name: torch.nn.Linear(width, len(values)) for name, values in labelled.values.items()
        }
        self.heads = torch.nn.ModuleDict(heads)

    def forward(
        self,
        pixels: torch.Tensor,
        ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's mean patch (n, width), and logits of the words (n, words, vocabulary)."""
        llava = self.model.model
        patches = self.patches(pixels)
        words = self.model.get_input_embeddings()(ids)
        inputs = torch.cat([llava.multi_modal_projector(patches), words], dim=1)
        hidden = llava.language_model(inputs_embeds=inputs).last_hidden_state
        answer = hidden[:, patches.shape[1] :]
        return patches.mean(1).float(), self.model.lm_head(answer[:, :-1]).float()

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tower's last layer: (n, patches, width)."""
        tower = self.model.model.vision_tower
        return tower(pixels, output_hidden_states=True).hidden_states[-1]


def train(
    labelled: Labelled,
    out: Path,
    work: Path,
    plan: TrainingPlan,
    log: Callable[[str], None],
) -> Training:
    """Train and save into `out`, with a checkpoint in `work`.

    On CUDA in bfloat16, or on the CPU. Raises UsageError where `work` has another training.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(plan.seed)
    model, processor = network.build(labelled.sentences)
    learner = _Learner(model, labelled).to(device)
    loop = _Loop(learner, _Photos(labelled, processor, device), plan, _digest(plan, labelled))
    loop.run(work / "checkpoint.pt", log)
    learner.model.eval().cpu()
    learner.model.half().save_pretrained(out)
    processor.save_pretrained(out)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    return Training(plan, loop.curve, loop.seconds, name)


class _Photos:
    """The photos, with their sentences as word ids and their labels on the training's device."""

    def __init__(
        self,
        labelled: Labelled,
        processor: Any,
        device: str,
    ):
        self.device = device
        self._photos = labelled.photos
        tokenizer = processor.tokenizer
        sentences = tokenizer(labelled.sentences, add_special_tokens=False)["input_ids"]
        start = tokenizer.convert_tokens_to_ids(network.ANSWER)
        ids = [torch.tensor([start, *words, network.END]) for words in sentences]
        self.ids = pad_sequence(ids, batch_first=True).to(device)
        self.labels = {
            name: torch.from_numpy(labels).to(device) for name, labels in labelled.labels.items()
        }
        weights = np.where(labelled.held_out, 0, labelled.weights)
        self._chances = weights / weights.sum()
        self._held_out = np.flatnonzero(labelled.held_out)[:_VALIDATION_PHOTOS]

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Rows by weight, and none that is held out."""
        return rng.choice(len(self._chances), count, p=self._chances)

    def pixels(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._photos[rows]).to(self.device)

    @torch.no_grad()
    def accuracy(self, learner: _Learner) -> dict[str, float]:
        """The accuracy of every head on the held-out photos whose label is known."""
        learner.eval()
        pooled = []
        for rows in np.split(self._held_out, range(250, len(self._held_out), 250)):
            with _autocast(self.device):
                patches = learner.patches(plain(self.pixels(rows)))
            pooled.append(patches.mean(1).float())
        learner.train()
        features = torch.cat(pooled)
        held_out = torch.from_numpy(self._held_out).to(self.device)
        accuracy = {}
        for name, head in learner.heads.items():
            labels = self.labels[name][held_out]
            labelled = labels >= 0
            if labelled.any():
                correct = head(features).argmax(1) == labels
                accuracy[name] = correct[labelled].float().mean().item()
        return accuracy


class _Loop:
    """The steps of a training, and what a checkpoint holds of them."""

    def __init__(
        self,
        learner: _Learner,
        photos: _Photos,
        plan: TrainingPlan,
        digest: str,
    ):
        self.step = 0
        self.seconds = 0.0
        self.curve: list[Point] = []
        self._learner = learner
        self._photos = photos
        self._plan = plan
        self._digest = digest
        self._device = photos.device
        self._steps = max(1, plan.seen // plan.batch)
        groups = _parameter_groups(learner)
        self._optimizer = torch.optim.AdamW(groups, _RATE, fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, _RATE, self._steps, pct_start=_WARM_UP
        )
        self._parts: dict[str, Any] = {
            "learner": learner,
            "optimiser": self._optimizer,
            "schedule": self._schedule,
        }

    def run(self, checkpoint: Path, log: Callable[[str], None]) -> None:
        if checkpoint.exists():
            self._resume(checkpoint)
            log(f"going on from step {self.step:,} of {self._steps:,}")
        started = time.monotonic() - self.seconds
        saved = logged = time.monotonic()
        logged_step = self.step
        for step in range(self.step, self._steps):
            loss = self._update(step)
            self.step = step + 1
            now = time.monotonic()
            self.seconds = now - started
            validate = self.step * _VALIDATIONS // self._steps > step * _VALIDATIONS // self._steps
            if validate or now - logged > _LOG_SECONDS:
                if validate:
                    accuracy = self._photos.accuracy(self._learner)
                    self.curve.append(Point(self._seen(self.step), loss.item(), accuracy))
                rate = self._seen(self.step - logged_step) / (now - logged)
                log(self._progress(loss.item(), rate))
                logged_step = self.step
                logged = time.monotonic()
            if now - saved > _SAVE_SECONDS:
                _save(checkpoint, self._state())
                saved = time.monotonic()
        self.seconds = time.monotonic() - started

    def _seen(self, steps: int) -> int:
        return steps * self._plan.batch

    def _progress(
        self,
        loss: float,
        rate: float,
    ) -> str:
        seen = self._seen(self.step)
        total = self._seen(self._steps)
        held_out = "not yet"
        if self.curve:
            accuracy = self.curve[-1].right
            held_out = ", ".join(f"{name} {share:.3f}" for name, share in accuracy.items())
        return (
            f"{seen:,} of {total:,} photos seen, {rate:,.0f}/s, "
            f"{(total - seen) / rate / 60:.1f} min left; loss {loss:.3f}; held out: {held_out}"
        )

    def _update(self, step: int) -> torch.Tensor:
        """One step of the optimizer; the loss before it."""
        loss = self._loss(step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._learner.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return loss

    def _loss(self, step: int) -> torch.Tensor:
        plan = self._plan
        # Every step has its own seed, so that a resumed training does the same.
        rows = self._photos.draw(plan.batch, np.random.default_rng([plan.seed, step]))
        seed = plan.seed * 1_000_003 + step
        rng = torch.Generator(self._device).manual_seed(seed)
        torch.manual_seed(seed)
        pixels = augment(self._photos.pixels(rows), rng)
        positions = torch.from_numpy(rows).to(self._device)
        ids = self._photos.ids[positions]
        with _autocast(self._device):
            features, logits = self._learner(pixels, ids)
        loss = _word_loss(logits, ids)
        for name, head in self._learner.heads.items():
            labels = self._photos.labels[name][positions]
            if (labels >= 0).any():
                loss = loss + _HEAD_WEIGHT * functional.cross_entropy(
                    head(features), labels, ignore_index=-1, label_smoothing=_SMOOTHING
                )
        return loss

    def _state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()} | {
            "step": self.step,
            "spent": self.seconds,
            "curve": [asdict(point) for point in self.curve],
            "digest": self._digest,
        }

    def _resume(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, weights_only=True)
        if state["digest"] != self._digest:
            raise UsageError(
                f"{checkpoint}: it belongs to a training with other photos or settings. Name "
                "another --out, or delete it."
            )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.seconds = state["spent"]
        self.curve = [Point(**point) for point in state["curve"]]


def _word_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """By photo, and by five words of its sentence."""
    words = functional.cross_entropy(
        logits.flatten(0, 1),
        ids[:, 1:].flatten(),
        ignore_index=0,
        reduction="sum",
        label_smoothing=_SMOOTHING / 2,
    )
    return words / len(ids) / 5


def _parameter_groups(learner: _Learner) -> list[dict[str, Any]]:
    """The parameters by weight decay: only matrices have it."""
    matrices = [parameter for parameter in learner.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in learner.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def _autocast(device: str) -> torch.autocast:
    # CPUs without its instructions emulate bfloat16: seven times slower on an AMD EPYC.
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def _digest(plan: TrainingPlan, labelled: Labelled) -> str:
    """What a checkpoint belongs to."""
    return json.dumps([asdict(plan), len(labelled.sentences), labelled.values], sort_keys=True)


def _save(checkpoint: Path, state: dict[str, Any]) -> None:
    unfinished = checkpoint.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(checkpoint)
