"""The measuring scripts' own arithmetic: bytes by the formula, theory lines through the standard point, the derived tables."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import derive_scale
import measure_bytes
import measure_growth
from benchmark import STANDARD

from grpo_safe.runtime.profile import Machine

SCRIPTS = Path(measure_bytes.__file__).parent


def test_bytes_by_hand() -> None:
    """10 weights, 4 of them the table, 2 bytes each, 3 micro-batches."""
    full = measure_bytes.Sizes(10, 10, 4, tied=False)
    assert list(measure_bytes.expected("zero1", full, 2, 3).values()) == [0, 0, 20, 20]
    assert list(measure_bytes.expected("zero2", full, 2, 3).values()) == [0, 0, 20, 60]
    assert list(measure_bytes.expected("zero3", full, 2, 3).values()) == [20, 60, 120, 60]
    lora = measure_bytes.Sizes(12, 2, 4, tied=True)  # adapters of 2 weights beside the 10
    assert list(measure_bytes.expected("zero2", lora, 2, 3).values()) == [0, 0, 4, 12]
    assert list(measure_bytes.expected("zero3", lora, 2, 3).values()) == [24, 84, (16 + 12) * 6, 12]


def test_theory_meets_the_standard_point_and_shares_the_prompt() -> None:
    theory = measure_growth.Theory("embedded:tiny-llama", "embedded:tiny-bert", Machine(1e9, 1e9))
    parts = dict.fromkeys(("sampling", "scoring", "reference", "update"), 1.0)
    points = [
        STANDARD | own | {"seconds": 5.0, "spread": [4.0, 6.0], "parts": parts, "peak_gb": 1.0}
        for own in ({}, {"group_size": 16}, {"group_size": 32}, {"prompt_tokens": 1024}, {"objectives": 16})
    ]
    found = measure_growth.with_theory(points, theory)
    base, twice, four, long, heads = found
    assert (
        base["theory_parts"] == parts and base["theory_seconds"] == pytest.approx(5.0) and base["theory_gb"] == pytest.approx(1.0)
    )
    assert heads["theory_seconds"] == base["theory_seconds"]
    # the prompt is read once whatever G is: each further completion costs the same, and doubling G less than doubles the update
    step = twice["theory_parts"]["update"] - 1.0
    assert four["theory_parts"]["update"] - twice["theory_parts"]["update"] == pytest.approx(2 * step)
    assert twice["theory_parts"]["update"] < 2.0
    assert long["theory_parts"]["update"] > 1.0 and long["theory_gb"] > 1.0
    assert [p["group_size"] for p in measure_growth.along(found, "group_size")] == [8, 16, 32]


def test_the_derived_figures_follow_from_the_shapes() -> None:
    seven = next(r for r in derive_scale.RUNS if r.name == "7B x 8, all weights")
    whole = 2 * seven.shape.parameters
    assert seven.shape.parameters == pytest.approx(7.62e9, rel=0.01)
    assert derive_scale.LLAMA_70B.parameters == 70_553_706_496  # as its authors count
    assert derive_scale.micro_batches(seven) == 8
    layers = seven.shape.parameters - 2 * seven.shape.vocab * seven.shape.hidden
    assert derive_scale.sent(seven)["sampling"] == whole
    assert derive_scale.sent(seven)["update: weights"] == 16 * whole + 8 * 2 * layers  # forward, backward; the layers recomputed
    # two multiplications-and-additions per weight and token, attention and the head on top, prompts once per group
    tokens = 8 * 512 + 64 * 512
    reference = derive_scale.phases(seven, Machine(1.0, float("inf")))["reference"]
    assert 2 * layers * tokens < reference < 2.6 * layers * tokens
    assert derive_scale.fits(derive_scale.memory_of(seven), 80) and not derive_scale.fits(
        derive_scale.memory_of(replace(seven, shape=derive_scale.LLAMA_70B, gpus=128)), 80
    )


@pytest.mark.slow
def test_what_zero_sends_is_what_the_formula_says(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "measure_bytes.py"), "--out", str(tmp_path / "bytes.md")],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = (tmp_path / "bytes.md").read_text().splitlines()[2:]
    assert len(rows) == 8
    for row in rows:
        cells = [c.strip() for c in row.strip("|").split("|")]
        for cell in cells[5:9]:
            found, formula = (int(x.replace(",", "")) for x in cell.split(", "))
            if "kept" in cells[0]:
                assert found <= 1.01 * formula
            else:
                assert abs(found - formula) <= 0.01 * formula + 1000, row
