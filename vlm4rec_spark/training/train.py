"""Teaches a captioner: photos and sentences in, a folder that transformers loads out. Seeded; goes on where it stopped.

The decoder learns the sentences. Linear heads on the pooled tower learn the attributes, and a projection of it learns
what the teacher sees; both only tell the tower what to look for, and are thrown away.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.training import network
from vlm4rec_spark.training.augment import augment, plain
from vlm4rec_spark.training.labelled import Labelled
from vlm4rec_spark.training.teacher import WIDTH, Teacher

_SAVE_SECONDS, _SAY_SECONDS = 120, 15
_POINTS, _VALIDATED = 20, 1_000
"""How often held-out photos are looked at on the way, and how many: they take time from the training."""
_WARM_UP = 0.06
_HEADS, _DISTILLED = 0.5, 2.0
"""Weights of what the heads and the teacher say, beside the sentence's words."""
_SMOOTHING = 0.1
_NEW = 10
"""How much faster than the others those weights learn that are new where the captioner isn't."""


@dataclass(frozen=True)
class TrainingPlan:
    """How much is looked at, and how.

    `seen`: photos, over all; each is looked at several times, never quite the same. `start`: the folder of a captioner
    to go on from, "" for none. `mirrored`: the share of photos that are changed in no other way, as the catalogue's own
    photos are; it wins accuracy on them late in a training, and loses some on photos taken otherwise. `kept`: the share
    that the start's weights have in the result (WiSE-FT, Wortsman et al. 2022), which wins most of that back.
    """

    seen: int = 400_000
    batch: int = 96
    rate: float = 1e-3
    seed: int = 0
    teacher: bool = False
    start: str = ""
    mirrored: float = 0.0
    kept: float = 0.0


def device_name() -> str:
    """What the training runs on, for people."""
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    )


@dataclass(frozen=True)
class Point:
    """How far the training was: photos seen, the loss of late, and how often heads are right on held-out photos."""

    seen: int
    loss: float
    right: dict[str, float]


class _Learner(torch.nn.Module):
    """The captioner with what is only needed while it learns."""

    def __init__(self, model: Any, labelled: Labelled, teacher: bool):
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, len(v)) for name, v in labelled.values.items()}
        )
        self.as_teacher = torch.nn.Linear(width, WIDTH) if teacher else None

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's mean place (n, width), and logits of each word of the sentences (n, words, vocabulary)."""
        llava = self.model.model
        seen = llava.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        given = torch.cat(
            [llava.multi_modal_projector(seen), self.model.get_input_embeddings()(ids)], dim=1
        )
        hidden = llava.language_model(inputs_embeds=given).last_hidden_state[:, seen.shape[1] :]
        return seen.mean(1).float(), self.model.lm_head(hidden[:, :-1]).float()


def train(
    labelled: Labelled, out: Path, work: Path, plan: TrainingPlan, say: Callable[[str], None]
) -> tuple[list[Point], float]:
    """Train and save into `out`; a checkpoint lies in `work`. Returns the curve, and the seconds that it took.

    On CUDA where there is one, in bfloat16, else on the CPU. Raises UsageError where `work` holds another training.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(plan.seed)
    model, processor = network.build(labelled.sentences)
    new_words = network.inherit(model, processor, Path(plan.start)) if plan.start else []
    before = (
        {name: each.detach().clone() for name, each in model.named_parameters()}
        if plan.kept
        else {}
    )
    learner = _Learner(model, labelled, plan.teacher).to(device)
    teacher = Teacher(device) if plan.teacher else None
    groups = _groups(learner, plan)
    optimiser = torch.optim.AdamW(groups, plan.rate, fused=True)
    steps = max(1, plan.seen // plan.batch)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rates, total_steps=steps, pct_start=_WARM_UP
    )
    parts = {"learner": learner, "optimiser": optimiser, "schedule": schedule}
    data = _Photos(labelled, processor, device)
    checkpoint = work / "checkpoint.pt"
    first, spent, curve = _resume(checkpoint, parts, _digest(plan, labelled))
    if first:
        say(f"going on from step {first:,} of {steps:,}")
    started = saved = spoke = time.monotonic()
    since = first
    for step in range(first, steps):
        loss = _step(learner, teacher, data, plan, step, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        now = time.monotonic()
        looked = (step + 1) * _POINTS // steps > step * _POINTS // steps
        if looked or now - spoke > _SAY_SECONDS:
            done, rate = (step + 1) * plan.batch, (step + 1 - since) * plan.batch / (now - spoke)
            if looked:
                curve.append(Point(done, loss.item(), data.right(learner)))
            left = (steps * plan.batch - done) / rate / 60
            held = (
                ", ".join(f"{name} {share:.3f}" for name, share in curve[-1].right.items())
                if curve
                else "not yet"
            )
            say(
                f"{done:,} of {steps * plan.batch:,} photos seen, {rate:,.0f}/s, {left:.1f} min left; "
                f"loss {loss.item():.3f}; held out: {held}"
            )
            since, spoke = step + 1, time.monotonic()
        if now - saved > _SAVE_SECONDS:
            _save(
                checkpoint, parts, step + 1, spent + now - started, curve, _digest(plan, labelled)
            )
            saved = time.monotonic()
    learner.model.eval().cpu()
    _keep(learner.model, before, new_words, plan.kept)
    learner.model.half().save_pretrained(out)
    processor.save_pretrained(out)
    return curve, spent + time.monotonic() - started


@torch.no_grad()
def _keep(model: Any, before: dict[str, torch.Tensor], new_words: list[int], share: float) -> None:
    """Move the weights towards those of before by the share, but for words that were new then."""
    for name, each in model.named_parameters():
        if name in before:
            learnt = each[new_words].clone() if name.endswith("embed_tokens.weight") else None
            each.lerp_(before[name], share)
            if learnt is not None:
                each[new_words] = learnt


def _groups(learner: _Learner, plan: TrainingPlan) -> list[dict[str, Any]]:
    """The weights that learn, by rate and decay: what is new beside a captioner to go on from learns faster."""
    new = {
        id(each)
        for name, each in learner.named_parameters()
        if plan.start and not name.startswith("model.")
    }
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for each in learner.parameters():
        if each.requires_grad:
            groups.setdefault((id(each) in new, each.ndim > 1), []).append(each)
    return [
        {
            "params": found,
            "lr": plan.rate * (_NEW if fresh else 1),
            "weight_decay": 0.05 if decayed else 0.0,
        }
        for (fresh, decayed), found in groups.items()
    ]


class _Photos:
    """The photos, their sentences as words, and their labels, where the training wants them."""

    def __init__(self, labelled: Labelled, processor: Any, device: str):
        self.device, self.all = device, labelled.photos
        self.photos = (
            torch.from_numpy(np.ascontiguousarray(labelled.photos)).to(device)
            if device == "cuda"
            else None
        )
        said = processor.tokenizer(labelled.sentences, add_special_tokens=False)["input_ids"]
        asked = processor.tokenizer.convert_tokens_to_ids(network.ASKED)
        longest = max(map(len, said))
        rows = [[asked, *words, network.END, *[0] * (longest - len(words))] for words in said]
        self.ids = torch.tensor(rows, device=device)
        self.labels = {
            name: torch.from_numpy(each).to(device) for name, each in labelled.labels.items()
        }
        weights = np.where(labelled.held_out, 0, labelled.weights)
        self.chances = np.cumsum(weights) / weights.sum()
        self.held_out = np.flatnonzero(labelled.held_out)[:_VALIDATED]

    def draw(self, count: int, chance: np.random.Generator) -> np.ndarray:
        return np.searchsorted(self.chances, chance.random(count), side="right").clip(
            max=len(self.all) - 1
        )

    def pixels(self, rows: np.ndarray) -> torch.Tensor:
        if self.photos is not None:
            return self.photos[torch.from_numpy(rows).to(self.device)]
        order = np.argsort(rows)
        found = np.empty((len(rows), *self.all.shape[1:]), np.uint8)
        found[order] = self.all[rows[order]]
        return torch.from_numpy(found)

    @torch.no_grad()
    def right(self, learner: _Learner) -> dict[str, float]:
        """Share of the held-out photos of which each head is right, where the truth is known."""
        learner.eval()
        pooled = []
        for first in range(0, len(self.held_out), 250):
            rows = self.held_out[first : first + 250]
            with _fast(self.device):
                seen = learner.model.model.vision_tower(
                    plain(self.pixels(rows)), output_hidden_states=True
                )
            pooled.append(seen.hidden_states[-1].mean(1).float())
        learner.train()
        together, found = torch.cat(pooled), {}
        for name, head in learner.heads.items():
            truth = self.labels[name][torch.from_numpy(self.held_out).to(self.device)]
            known = truth >= 0
            if known.any():
                found[name] = (head(together).argmax(1) == truth)[known].float().mean().item()
        return found


def _step(
    learner: _Learner,
    teacher: Teacher | None,
    data: _Photos,
    plan: TrainingPlan,
    step: int,
    device: str,
) -> torch.Tensor:
    # Each step draws from a seed of its own: a training that was stopped goes on as it would have.
    rows = data.draw(plan.batch, np.random.default_rng([plan.seed, step]))
    chance = torch.Generator(device).manual_seed(plan.seed * 1_000_003 + step)
    torch.manual_seed(plan.seed * 1_000_003 + step)
    pixels = augment(data.pixels(rows), chance, plan.mirrored)
    places = torch.from_numpy(rows).to(device)
    ids = data.ids[places]
    with _fast(device):
        seen, said = learner(pixels, ids)
        taught = teacher.features(pixels) if teacher else None
    words = functional.cross_entropy(
        said.flatten(0, 1),
        ids[:, 1:].flatten(),
        ignore_index=0,
        reduction="sum",
        label_smoothing=_SMOOTHING / 2,
    )
    loss = words / plan.batch / 5
    for name, head in learner.heads.items():
        truth = data.labels[name][places]
        if (truth >= 0).any():
            loss = loss + _HEADS * functional.cross_entropy(
                head(seen), truth, ignore_index=-1, label_smoothing=_SMOOTHING
            )
    if taught is not None and learner.as_teacher is not None:
        loss = (
            loss
            + _DISTILLED
            * (1 - functional.cosine_similarity(learner.as_teacher(seen), taught)).mean()
        )
    return loss


def _fast(device: str) -> torch.autocast:
    # On CPUs without instructions for it bfloat16 is emulated: measured on an AMD EPYC, seven times slower.
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def _digest(plan: TrainingPlan, labelled: Labelled) -> str:
    """What a checkpoint belongs to."""
    return json.dumps([asdict(plan), len(labelled.sentences), labelled.values], sort_keys=True)


def _resume(checkpoint: Path, parts: dict[str, Any], digest: str) -> tuple[int, float, list[Point]]:
    if not checkpoint.exists():
        return 0, 0.0, []
    state = torch.load(checkpoint, weights_only=True)
    if state["digest"] != digest:
        raise UsageError(
            f"{checkpoint}: it belongs to a training with other photos or settings. Give another --work "
            "folder, or delete it."
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["spent"], [Point(**point) for point in state["curve"]]


def _save(
    checkpoint: Path,
    parts: dict[str, Any],
    step: int,
    spent: float,
    curve: list[Point],
    digest: str,
) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    beside = checkpoint.with_suffix(".tmp")
    torch.save(
        {
            **state,
            "step": step,
            "spent": spent,
            "curve": [asdict(p) for p in curve],
            "digest": digest,
        },
        beside,
    )
    beside.replace(checkpoint)
