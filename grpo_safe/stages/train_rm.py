"""Stage 1: labelled answers and preference pairs -> one reward model with a head per objective.

One forward scores all K objectives. Labels in [0, 1] are fitted by masked squared error, pairs by Bradley-Terry on the same head; each
head counts the same, however rare its labels. Afterwards every head is calibrated on one half of the validation prompts, and judged on
the other half: that is the card, and the gate that train-policy asks.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from grpo_safe import models, runtime
from grpo_safe.algorithm.order import derived_seed, rows_of_step
from grpo_safe.algorithm.regression import LabelCounts, bradley_terry, masked_mse
from grpo_safe.algorithm.schedule import learning_rate
from grpo_safe.algorithm.statistics import affine_fit, collapsed
from grpo_safe.config import TrainRMConfig
from grpo_safe.data.leakage import unseen_rows
from grpo_safe.data.rows import load_rows
from grpo_safe.data.text import ScoringInput, encode_for_scoring, formatter_of
from grpo_safe.errors import StageError, UserError
from grpo_safe.models.reward_model import collate, open_classifier, token_batches
from grpo_safe.records import LabelledRow, Row
from grpo_safe.rewards.card import COLLAPSED_MEANS, Judged, reward_model_card, show_card, write_card
from grpo_safe.runtime import Runtime, Trainable
from grpo_safe.tracking import Tracker
from grpo_safe.versions import checkpoint, resume

EXPORT_ROWS = 16  # judged rows that are scored again by what was written
EXPORT_GAP = {"float32": 1e-4, "bfloat16": 0.05}  # by how much their uncalibrated scores may differ in the mean


@dataclass(frozen=True)
class Example:
    """A row as the model reads it: one input and its labels, or two inputs and the head that prefers the first."""

    row: Row
    inputs: list[ScoringInput]  # 1 labelled, 2 a pair (chosen, rejected)
    labels: torch.Tensor  # [K]
    mask: torch.Tensor  # [K] 1 where a label is
    head: int  # of a pair; -1 for a labelled row


class Scorer(nn.Module):
    """The sequence classifier and a temperature per head for pairs, one forward (so that ZeRO-3 gathers both)."""

    def __init__(self, model: nn.Module, heads: int) -> None:
        super().__init__()
        self.model = model
        self.log_temperature = nn.Parameter(torch.full((heads,), float(np.log(4.0))))

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [n, K] in float32, temperature [K]."""
        return self.model(**inputs).logits.float(), self.log_temperature.exp()


def run(cfg: TrainRMConfig, run_dir: Path) -> None:
    """Fit, calibrate, judge, publish."""
    torch.manual_seed(cfg.seed)
    names = list(cfg.data.objectives)
    train_rows, validation_rows = load_rows(cfg.data, cfg.seed)
    validation_rows, leaked = unseen_rows(train_rows, validation_rows)
    files = {"train": train_rows.fingerprints, "validation": validation_rows.fingerprints}
    if cfg.resume:
        resume.refuse_changed_data(run_dir, files)
    start = models.resolve_start(cfg.backbone.start, cfg.backbone.revision, cfg.backbone.trust_remote_code, "backbone.start")
    tokenizer = models.load_tokenizer(start)
    config = models.load_config(start)
    models.check_tokens(tokenizer, config, start)
    readable = models.context_length(config)
    start = models.pinned(start)
    if cfg.backbone.max_length > readable:
        raise UserError(f"backbone.max_length={cfg.backbone.max_length}: {start.name} reads {readable} tokens")
    checkpoint.require_room(Path(cfg.store), 2 * models.weight_bytes(start) + 10**7, "a reward model")
    train, said = read_whole(encode(train_rows.rows, tokenizer, names, cfg.backbone.max_length), tokenizer, cfg, "data.train")
    validation, said_too = read_whole(
        encode(validation_rows.rows, tokenizer, names, cfg.backbone.max_length), tokenizer, cfg, "data.validation"
    )

    rt = runtime.start(cfg.launch, cfg.optim.max_grad_norm, cfg.backbone.dtype == "bfloat16")
    tracker = Tracker(cfg.tracking, run_dir, asdict(cfg), rt.is_main)
    torch.manual_seed(cfg.seed)  # the head's first weights are the same on every rank
    master = not cfg.backbone.lora.enabled and rt.strategy == "single"
    loaded = replace(cfg.backbone, dtype="float32") if master else cfg.backbone
    scorer = Scorer(models.load_backbone(start, loaded, names, tokenizer.pad_token_id), len(names))
    trainable = runtime.prepare(rt, scorer, cfg.optim, cfg.backbone.dtype == "bfloat16")
    if rt.is_main and not cfg.resume:
        resume.note_data(run_dir, files)
    for warning in (*said, *said_too, *([leaked] if leaked else [])):
        tracker.say(f"warning: {warning}")
    tracker.say(
        f"train-rm: {len(train)} rows of data {cfg.data.name}, {len(validation)} for validation, objectives {', '.join(names)}, backbone {start.name}"
    )

    fit(cfg, rt, trainable, train, tokenizer.pad_token_id, tracker, run_dir)

    with trainable.gathered() as whole:
        half, judging = halves(validation)
        tracker.say(f"train-rm: judging {len(validation)} validation rows")
        scores_half = predict(whole, half, rt, tokenizer.pad_token_id, cfg.train.micro_batch_tokens)
        scores_judging = predict(whole, judging, rt, tokenizer.pad_token_id, cfg.train.micro_batch_tokens)
        if rt.is_main:
            version = publish(
                cfg, whole, start, tokenizer, (half, scores_half), (judging, scores_judging), train_rows.fingerprints, tracker
            )
            resume.mark_published(run_dir, version)
    rt.barrier()
    tracker.close()


# --- fitting ----------------------------------------------------------------------------------------------------------


def fit(
    cfg: TrainRMConfig, rt: Runtime, trainable: Trainable, train: list[Example], pad: int, tracker: Tracker, run_dir: Path
) -> None:
    """Epochs of shuffled rows; a step's denominators count all ranks and micro-batches."""
    per_step = cfg.train.rows_per_step
    total = max(1, round(cfg.train.epochs * len(train) / per_step))
    resumed = resume.load(run_dir, trainable) if cfg.resume else resume.Resumed(0, {}, {})
    done, skipped, skipped_in_a_row = resumed.step, resumed.record.get("skipped", 0), resumed.record.get("skipped_in_a_row", 0)
    resume.refuse_finished(run_dir, done, total)
    resume.rewind_logs(run_dir, done, rt)
    tracker.start(total, done, "train-rm")
    trainable.model.train()
    for step in range(done + 1, total + 1):
        rows = [train[i] for i in rows_of_step(len(train), per_step, step, cfg.seed)]
        counts = count_labels(rows)
        micros = micro_batches(rows[rt.rank :: rt.world_size], cfg.train.micro_batch_tokens)
        torch.manual_seed(derived_seed(cfg.seed, step, rt.rank))  # dropout: a resumed run draws the same masks
        loss_sum = torch.zeros(())
        for i in range(rounds := rt.maximum(len(micros))):
            micro = micros[i] if i < len(micros) else rows[:1]  # every rank runs as many forwards, or ZeRO hangs
            loss = micro_loss(trainable.model, micro, counts, pad, rt.device) * float(i < len(micros))
            trainable.backward(loss, last=i == rounds - 1)
            loss_sum += loss.detach().cpu()
        lr = learning_rate(step, total, cfg.optim.lr, cfg.optim.schedule, cfg.optim.warmup, cfg.optim.min_lr)
        grad_norm = trainable.step(lr)
        skipped_in_a_row = 0 if math.isfinite(grad_norm) else skipped_in_a_row + 1
        skipped += not math.isfinite(grad_norm)
        if skipped_in_a_row >= cfg.train.max_skipped:
            raise StageError(
                f"step {step}: the gradient was not finite in {skipped_in_a_row} steps in a row (train.max_skipped); nothing was published. Lower optim.lr"
            )
        loss_value = float(rt.sum(loss_sum))
        tracker.advance(f"loss {loss_value:.4f}")
        if step % cfg.train.log_every == 0 or step in (1, total):
            figures = {"loss": loss_value, "grad_norm": grad_norm, "lr": lr, "epoch": step * per_step / len(train)}
            tracker.log(step, figures | {"skipped_updates": skipped})
        if step == total or (
            cfg.train.save_every and step % cfg.train.save_every == 0
        ):  # what was fitted is safe before it is judged
            record = {"skipped": skipped, "skipped_in_a_row": skipped_in_a_row}
            resume.save(run_dir, step, trainable, rt, record, keep=1, optimizer_steps=step - skipped)


def micro_loss(model: nn.Module, micro: list[Example], counts: LabelCounts, pad: int, device: torch.device) -> torch.Tensor:
    """The micro-batch's share of the step's loss."""
    scores, temperature = model(**collate([i for e in micro for i in e.inputs], pad, device))
    labelled, chosen, rejected, heads = [], [], [], []
    place = 0
    for example in micro:
        if example.head < 0:
            labelled.append(place)
        else:
            chosen.append(place)
            rejected.append(place + 1)
            heads.append(example.head)
        place += len(example.inputs)
    counts = LabelCounts(counts.labels.to(device), counts.pairs.to(device))
    loss = 0.0 * temperature.sum()  # keeps the temperature in the graph where a micro-batch has no pairs
    if labelled:
        labels = torch.stack([e.labels for e in micro if e.head < 0]).to(device)
        mask = torch.stack([e.mask for e in micro if e.head < 0]).to(device)
        loss = loss + masked_mse(scores[labelled], labels, mask, counts)
    if heads:
        head_index = torch.tensor(heads, device=device)
        margins = scores[chosen, head_index] - scores[rejected, head_index]
        loss = loss + bradley_terry(margins, head_index, temperature, counts)
    return loss


def micro_batches(rows: list[Example], budget: int) -> list[list[Example]]:
    """Rows of like length together, at most `budget` tokens each with padding; a pair brings two inputs."""
    batches: list[list[Example]] = []
    inputs = 0
    for example in sorted(rows, key=lambda e: max(len(i.ids) for i in e.inputs)):  # ascending: the new row is the widest
        width = max(len(i.ids) for i in example.inputs)
        inputs += len(example.inputs)
        if batches and inputs * width <= budget:
            batches[-1].append(example)
        else:
            batches.append([example])
            inputs = len(example.inputs)
    return batches


def count_labels(rows: list[Example]) -> LabelCounts:
    """Labels and pairs per head among the rows of a whole step (every rank knows them all)."""
    heads = rows[0].labels.numel()
    pairs = torch.zeros(heads)
    for example in rows:
        if example.head >= 0:
            pairs[example.head] += 1
    return LabelCounts(torch.stack([e.mask for e in rows]).sum(0), pairs)


def encode(rows: list[Row], tokenizer: Any, names: list[str], max_length: int) -> list[Example]:
    """Rows -> token ids and label tensors."""
    examples = []
    for row in rows:
        labels, mask = torch.zeros(len(names)), torch.zeros(len(names))
        if isinstance(row, LabelledRow):
            for name, value in row.labels.items():
                labels[names.index(name)], mask[names.index(name)] = value, 1.0
            texts, head = [row.response], -1
        else:
            texts, head = [row.chosen, row.rejected], names.index(row.objective)
        inputs = [encode_for_scoring(tokenizer, row.prompt, text, max_length) for text in texts]
        examples.append(Example(row, inputs, labels, mask, head))
    return examples


def read_whole(examples: list[Example], tokenizer: Any, cfg: TrainRMConfig, key: str) -> tuple[list[Example], list[str]]:
    """The examples that say something as the model reads them, and sentences on what is left out and what was cut.

    A pair whose inputs are the same tokens, and an answer of which no token is left, teach nothing. Raises UserError where they are most
    rows, or where nothing is left of an objective.
    """
    kept = [e for e in examples if not (_alike(e) or _empty(e, tokenizer))]
    left_out = len(examples) - len(kept)
    limit = f"backbone.max_length={cfg.backbone.max_length}"
    said = []
    if left_out:
        pairs = sum(map(_alike, examples))
        said.append(
            f"{key}: {left_out} of {len(examples)} rows say nothing as the model reads them at {limit} ({pairs} pairs whose answers are the "
            f"same tokens, {left_out - pairs} answers without a token); they are left out"
        )
        lost = _taught(examples, cfg) - _taught(kept, cfg)
        if 2 * left_out > len(examples) or lost:
            raise UserError(
                f"{said[0]}: {'no row is left for ' + ', '.join(sorted(lost)) if lost else 'these are most'}; raise backbone.max_length, "
                "shorten the answers, or choose a backbone whose tokenizer reads them"
            )
    inputs = [i for e in kept for i in e.inputs]
    cut = sum(i.cut > 0 or len(i.ids) >= cfg.backbone.max_length for i in inputs)
    if cut:
        said.append(f"{key}: {cut} of {len(inputs)} inputs fill {limit} or were cut to it, the prompt's left side first")
    return kept, said


def _alike(example: Example) -> bool:
    return len(example.inputs) == 2 and example.inputs[0].ids == example.inputs[1].ids


def _empty(example: Example, tokenizer: Any) -> bool:
    """Whether no token is left of an answer: controls and blanks, which some tokenizers drop (letters and digits none)."""
    row = example.row
    texts = [row.response] if isinstance(row, LabelledRow) else [row.chosen, row.rejected]
    rare = [text for text in texts if not any(map(str.isalnum, text))]
    return not _alike(example) and any(not tokenizer(text, add_special_tokens=False)["input_ids"] for text in rare)


def _taught(examples: list[Example], cfg: TrainRMConfig) -> set[str]:
    """The objectives that have a label or a pair."""
    return {name for k, name in enumerate(cfg.data.objectives) if any(e.head == k or e.mask[k] > 0 for e in examples)}


# --- judging ----------------------------------------------------------------------------------------------------------


def halves(validation: list[Example]) -> tuple[list[Example], list[Example]]:
    """Split by prompt: one half calibrates, the other judges. An affine fit on the split that judges lets noise pass."""
    calibrating = [e for e in validation if int(e.row.prompt.id[8:16], 16) % 2 == 0]
    judging = [e for e in validation if int(e.row.prompt.id[8:16], 16) % 2 == 1]
    if not calibrating or not judging:
        raise UserError(
            f"data.validation: {len(validation)} rows over too few prompts to calibrate on one half and judge on the other"
        )
    return calibrating, judging


def predict(whole: nn.Module, examples: list[Example], rt: Runtime, pad: int, budget: int) -> list[np.ndarray]:
    """Per example, scores [inputs, K] of the uncalibrated model; the work is shared among the ranks."""
    mine = rt.share(list(range(len(examples))))
    flat = [(e, i) for e in mine for i in range(len(examples[e].inputs))]
    scores: dict[tuple[int, int], np.ndarray] = {}
    with torch.inference_mode():
        for index in token_batches([len(examples[e].inputs[i].ids) for e, i in flat], budget):
            batch = collate([examples[flat[j][0]].inputs[flat[j][1]] for j in index], pad, rt.device)
            for j, row in zip(index, whole(**batch)[0].cpu().numpy(), strict=True):
                scores[flat[j]] = row
    merged = {key: row for part in rt.gather(scores) for key, row in part.items()}
    return [np.stack([merged[e, i] for i in range(len(examples[e].inputs))]) for e in range(len(examples))]


def calibrations(names: list[str], half: list[Example], scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Slope and offset [K] per head with labels; a head with pairs only keeps its relative scale."""
    slope, offset = np.ones(len(names)), np.zeros(len(names))
    for k in range(len(names)):
        if rows := labelled_scores(k, half, scores):
            slope[k], offset[k] = affine_fit(*np.array(rows).T)
    return slope, offset


def labelled_scores(k: int, half: list[Example], scores: list[np.ndarray]) -> list[tuple[float, float]]:
    """(raw score, label) of head k, of the rows that have its label."""
    return [(s[0, k], float(e.labels[k])) for e, s in zip(half, scores, strict=True) if e.mask[k] > 0]


def publish(
    cfg: TrainRMConfig, whole: Any, start: models.Start, tokenizer: Any, half: tuple[list[Example], list[np.ndarray]],
    judging: tuple[list[Example], list[np.ndarray]], fingerprints: list[dict[str, Any]], tracker: Tracker,
) -> str:  # fmt: skip
    """Calibrate, make the card on the other half, write the version; returns where it lies."""
    names = list(cfg.data.objectives)
    slope, offset = calibrations(names, *half) if cfg.train.calibrate else (np.ones(len(names)), np.zeros(len(names)))
    temperature = whole.log_temperature.detach().float().exp().cpu().numpy() / slope  # the margin grew by the slope
    in_float32 = replace(
        cfg.backbone, dtype="float32", gradient_checkpointing=False, lora=replace(cfg.backbone.lora, enabled=False)
    )
    fresh = models.load_backbone(start, in_float32, names, tokenizer.pad_token_id)
    model = models.detached_copy(whole.model, fresh, cfg.backbone.lora, "SEQ_CLS")
    if models.is_lora(model):
        model = models.merged(model)
    left = models.fold_affine(model, torch.tensor(slope), torch.tensor(offset)).numpy()
    judged = [Judged(e.row, s * slope + offset, sum(len(i.ids) for i in e.inputs)) for e, s in zip(*judging, strict=True)]
    binary = [o.binary for o in cfg.data.objectives.values()]
    card = reward_model_card(names, binary, judged, cfg.train.bootstrap, cfg.seed)
    for k, name in enumerate(names):
        if (rows := labelled_scores(k, *half)) and collapsed(*np.array(rows).T):
            card["objectives"][name]["collapsed"] = True
            tracker.say(f"warning: head {name} is collapsed: {COLLAPSED_MEANS}")
    labelled = {name for e in half[0] + judging[0] if isinstance(e.row, LabelledRow) for name in e.row.labels}
    objectives = [
        {
            "name": name,
            "range": list(o.range),
            "scale": "absolute" if name in labelled else "relative",
            "slope": float(slope[k]),
            "offset": float(left[k]),
            "temperature": float(temperature[k]),
            "weight": o.weight,
        }
        for k, (name, o) in enumerate(cfg.data.objectives.items())
    ]
    tokenizer.truncation_side = "left"  # an over-long input loses the prompt's left side in plain transformers too
    manifest = {
        "command": cfg.command,
        "config": asdict(cfg),
        "objectives": objectives,
        "scoring": {"formatter": formatter_of(tokenizer), "max_length": cfg.backbone.max_length},
        "metrics": card,
        "parents": [],
        "base": {"start": start.name, "revision": start.options.get("revision")},
        "data": {"name": cfg.data.name, "licence": cfg.data.licence, "files": fingerprints},
    }

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_card(folder / "README.md", card, manifest)
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
        written = open_classifier(folder, "float32")
        rows = slice(EXPORT_ROWS)
        check_export(written, judged[rows], judging[0][rows], slope, left, tokenizer.pad_token_id, cfg.backbone.dtype)

    found = checkpoint.publish(Path(cfg.store), "reward-model", write, manifest)
    show_card(card, f"reward model {found.name}")
    tracker.say(f"published {found.path}")
    return str(found.path)


def check_export(
    model: nn.Module, judged: list[Judged], examples: list[Example], slope: np.ndarray, offset: np.ndarray, pad: int, dtype: str
) -> None:
    """UserError where a published model, opened again, does not give the scores that the card is made of.

    judged, examples: the same rows; slope, offset: [K] of the calibration and of what stays outside of the weights; dtype: of the judged forward.
    """
    with torch.inference_mode():
        gaps = [
            np.abs(model(**collate(e.inputs, pad, torch.device("cpu"))).logits.float().numpy() + offset - j.scores).mean(0)
            for j, e in zip(judged, examples, strict=True)
        ]
    gap = np.mean(gaps, axis=0) / np.maximum(
        1.0, slope
    )  # a head that is stretched by its calibration shows rounding stretched too
    if not gap.max() <= EXPORT_GAP[dtype]:  # nan too
        raise UserError(
            f"the reward model as written gives other scores than the one that was judged: {gap.max():.1e} apart in the mean of {len(gaps)} rows, "
            f"{EXPORT_GAP[dtype]:g} is rounding. Nothing was published; choose another backbone.start, or backbone.lora.enabled=false"
        )
