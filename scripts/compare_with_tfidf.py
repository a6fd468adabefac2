"""Is a reward model better than counting words? python scripts/compare_with_tfidf.py REWARD_MODEL_FOLDER [--split heldout]

Fits TF-IDF + ridge per objective on the very rows that the reward model was fitted on, picks its strength on the calibrating half of the
validation prompts, and compares both by Spearman's rank correlation on the judging half (or on both halves, or on the held-out split), pooled and
within source, with 95% bootstrap intervals over prompts. "at most": what a faultless order of these labels reaches; ties in 0/1 labels keep it
below 1.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from grpo_safe.algorithm.statistics import bootstrap, spearman
from grpo_safe.config import DataConfig
from grpo_safe.data.rows import load_rows
from grpo_safe.models.reward_model import open_reward_model, score_texts
from grpo_safe.records import LabelledRow
from grpo_safe.versions import checkpoint

STRENGTHS = (0.3, 1.0, 3.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a published reward model")
    parser.add_argument("--split", choices=("validation", "both-halves", "heldout"), default="validation")
    parser.add_argument("--bootstrap", type=int, default=500)
    options = parser.parse_args()
    found = checkpoint.open_version(Path(), "reward-model", str(options.folder))
    figures = compare(found, options.split, options.bootstrap)
    show(figures)
    print(json.dumps(figures))


def compare(found: checkpoint.Version, split: str, resamples: int) -> dict[str, dict[str, object]]:
    """Per objective: Spearman of the reward model, of TF-IDF + ridge, and their difference, with intervals."""
    config = found.manifest["config"]
    data: DataConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config["data"]))  # type: ignore[assignment]
    train, validation = load_rows(data, config["seed"])
    calibrating = labelled(validation.rows, 0)
    judging = labelled(validation.rows, 1)
    if (
        split == "both-halves"
    ):  # ranks do not change under calibration; the ridge, though, picked its strength on one of the halves
        judging = labelled(validation.rows, None)
    if split == "heldout":
        judging = labelled(load_rows(replace(data, validation=data.heldout), config["seed"])[1].rows, None)
    model = open_reward_model(found, torch.device("cpu"))
    scores, _ = score_texts(model, [r.prompt for r in judging], [r.response for r in judging], 4096)
    fitted = [r for r in train.rows if isinstance(r, LabelledRow)]
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=2 if len(fitted) > 5000 else 1, max_features=200_000
    )
    vectorizer.fit([text_of(r) for r in fitted])
    result: dict[str, dict[str, object]] = {}
    for k, name in enumerate(model.objectives):
        rows = [(i, r) for i, r in enumerate(judging) if name in r.labels]
        if len(rows) < 10:
            continue
        label = np.array([r.labels[name] for _, r in rows])
        ours = scores[[i for i, _ in rows], k].numpy()
        theirs = ridge(vectorizer, fitted, calibrating, [r for _, r in rows], name)
        prompts = np.array([r.prompt.id for _, r in rows])
        sources = np.array([r.source for _, r in rows])
        result[name] = {
            "n": len(rows),
            "ceiling": spearman(
                np.argsort(np.argsort(label, kind="stable")).astype(float), label
            ),  # of a faultless order without ties
            "reward_model": bootstrap(spearman, prompts, (ours, label), resamples, 0).as_dict(),
            "tfidf": bootstrap(spearman, prompts, (theirs, label), resamples, 0).as_dict(),
            "difference": bootstrap(gain, prompts, (ours, theirs, label), resamples, 0).as_dict(),
            "within_source": {
                s: [round(spearman(x[sources == s], label[sources == s]), 3) for x in (ours, theirs)]
                for s in sorted(set(sources.tolist()))
                if (sources == s).sum() >= 20 and np.ptp(label[sources == s]) > 0
            },
        }
    return result


def gain(ours: np.ndarray, theirs: np.ndarray, label: np.ndarray) -> float:
    return spearman(ours, label) - spearman(theirs, label)


def ridge(
    vectorizer: TfidfVectorizer, fitted: list[LabelledRow], calibrating: list[LabelledRow], judged: list[LabelledRow], name: str
) -> np.ndarray:
    """Predictions of the ridge whose strength does best on the calibrating half."""
    known, held = [r for r in fitted if name in r.labels], [r for r in calibrating if name in r.labels]
    features = [vectorizer.transform([text_of(r) for r in rows]) for rows in (known, held, judged)]
    models = [Ridge(alpha=a).fit(features[0], [r.labels[name] for r in known]) for a in STRENGTHS]
    held_labels = np.array([r.labels[name] for r in held])
    best = max(models, key=lambda m: spearman(m.predict(features[1]), held_labels))
    return best.predict(features[2])


def labelled(rows: list, half: int | None) -> list[LabelledRow]:
    """Labelled rows of one half of the prompts, as train-rm halves them."""
    return [r for r in rows if isinstance(r, LabelledRow) and (half is None or int(r.prompt.id[8:16], 16) % 2 == half)]


def text_of(row: LabelledRow) -> str:
    return f"{row.prompt.text} ||| {row.response}"


def show(figures: dict) -> None:
    table = Table(title="Spearman's rank correlation with the labels, 95% intervals")
    for column in ("objective", "n", "at most", "reward model", "TF-IDF + ridge", "difference", "within source: ours, TF-IDF"):
        table.add_column(column)
    for name, f in figures.items():
        cells = [f"{f[k]['value']:.3f} [{f[k]['low']:.3f}, {f[k]['high']:.3f}]" for k in ("reward_model", "tfidf", "difference")]
        within = "; ".join(f"{s} {a:.2f}, {b:.2f}" for s, (a, b) in f["within_source"].items())
        table.add_row(name, str(f["n"]), f"{f['ceiling']:.3f}", *cells, within)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
