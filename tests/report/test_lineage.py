"""What was made from what: the table, the tree, and a store with nothing in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.tree import Tree

from grpo_safe.report.lineage import family_tree, figures_line, print_versions
from grpo_safe.versions import checkpoint


def version(
    kind: str, number: int, *parents: dict[str, Any], start: str = "Qwen/base", content: str | None = None
) -> dict[str, Any]:
    return {
        "kind": kind, "version": number, "created": "2026-01-02T03:04:05+00:00", "config": {"name": "trial", "seed": 3},
        "content_sha256": content or f"{kind}-{number}", "base": {"start": start},
        "parents": [{k: p[k] for k in ("kind", "version", "content_sha256")} for p in parents],
        "metrics": {"objectives": {}} if kind == "reward-model" else {},
    }  # fmt: skip


def drawn(tree: Tree) -> list[Any]:
    """[label, [children]] of every child."""
    return [[str(child.label), drawn(child)] for child in tree.children]


def test_children_stand_below_their_parents() -> None:
    judge, other = version("reward-model", 1, start="bert"), version("reward-model", 2, start="bert")
    first = version("policy", 1, judge)
    second = version("policy", 2, first, judge)
    tree = drawn(family_tree([second, first, judge, other]))  # in any order
    assert tree == [
        ["reward-model v001  (from bert)", [["policy v001", [["policy v002", []]]]]],
        ["reward-model v002  (from bert)", []],
    ]


def test_several_children_of_one_reward_model() -> None:
    judge = version("reward-model", 1)
    tree = drawn(family_tree([judge, version("policy", 1, judge), version("policy", 2, judge)]))
    assert [child[0] for child in tree[0][1]] == ["policy v001", "policy v002"]


def test_version_whose_parent_is_gone_stands_at_the_root() -> None:
    gone = version("reward-model", 9)
    assert drawn(family_tree([version("policy", 1, gone)])) == [["policy v001", []]]
    judge = version("reward-model", 1)
    assert drawn(family_tree([judge, version("policy", 1, gone, judge)]))[0][1] == [["policy v001", []]]


def test_parents_in_a_circle_do_not_hang() -> None:
    a = version("policy", 1, version("policy", 2))
    b = version("policy", 2, version("policy", 1))
    assert drawn(family_tree([a, b])) == []


def test_a_parent_is_known_by_its_content_not_by_its_number() -> None:
    judge = version("reward-model", 1, content="now")
    child = version("policy", 1, version("reward-model", 1, content="before"))
    tree = drawn(family_tree([judge, child]))
    assert [label for label, _ in tree] == ["reward-model v001  (from Qwen/base)", "policy v001"]


def test_figures_of_a_reward_model_and_of_a_policy() -> None:
    judge = version("reward-model", 1) | {"metrics": {"objectives": {
        "safety": {"n": 9, "r2": {"value": 0.456}}, "wit": {"n": 0, "pair_accuracy": {"value": 0.7}},
        "both": {"n": 9, "r2": {"value": 0.1}, "pair_accuracy": {"value": 0.9}}, "flat": {"n": 9, "r2": {"value": None}}, "none": {"n": 0},
    }}}  # fmt: skip
    assert figures_line(judge) == "safety R2 0.46, wit pairs 0.70, both R2 0.10"
    policy = version("policy", 1) | {"metrics": {"reward/mean": 0.25, "kl": 0.01, "score/safety": 0.5}}
    assert figures_line(policy) == "reward 0.250, kl 0.010"
    assert figures_line(version("policy", 1)) == ""


def test_empty_store_says_how_the_first_version_comes(capsys: pytest.CaptureFixture[str]) -> None:
    print_versions(Path("nowhere"), [])
    assert "nowhere holds no version yet: grpo-safe train-rm publishes the first" in " ".join(capsys.readouterr().out.split())


def test_table_and_tree_of_published_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(draft: Path) -> None:
        (draft / "config.json").write_text(str(draft.parent.name))

    def publish(kind: str, manifest: dict[str, Any]) -> checkpoint.Version:
        kept = {k: v for k, v in manifest.items() if k in ("config", "base", "parents", "metrics")}
        return checkpoint.publish(tmp_path, kind, write, kept)

    judge = publish("reward-model", version("reward-model", 1, start="bert"))
    publish("policy", version("policy", 1, judge.manifest | {"kind": "reward-model"}))
    print_versions(tmp_path, [v.manifest for v in checkpoint.all_versions(tmp_path)])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "v001" in line and "trial" in line]
    assert len(rows) == 2
    assert any("Qwen/base; reward-model v001" in row for row in rows)
    tree = out.partition("lineage")[2]
    assert tree.index("reward-model v001  (from bert)") < tree.index("policy v001")
