"""Worker entry: python -m grpo_safe.stages train_policy RUN_DIR/config.yaml. One process of a run; the config is frozen."""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from grpo_safe.checks import load_frozen, typed
from grpo_safe.errors import StageError, UserError
from grpo_safe.lifetime import die_with_parent

MODULES = {"train_rm": "train-rm", "train_policy": "train-policy", "evaluate": "eval"}


def main(argv: list[str]) -> int:
    """Run one stage; what went wrong is written to RUN_DIR/error.json for the launcher. Exit codes as the CLI's."""
    if len(argv) != 2 or argv[0] not in MODULES:
        print(f"usage: python -m grpo_safe.stages {{{','.join(MODULES)}}} RUN_DIR/config.yaml", file=sys.stderr)
        return 2
    module, path = argv[0], Path(argv[1])
    run_dir = path.parent
    if not path.is_file():
        print(f"{path}: no such file; expected the config.yaml that grpo-safe froze into a run directory", file=sys.stderr)
        return 2
    try:
        cfg = load_frozen(MODULES[module], path)
        if cfg.launch.device == "cpu":  # before the first import of DeepSpeed
            os.environ["DS_ACCELERATOR"] = "cpu"
        import_module(f"grpo_safe.stages.{module}").run(typed(cfg), run_dir)
    except UserError as error:
        _report(run_dir, "user", str(error))
        return 2
    except StageError as error:
        _report(run_dir, "stage", str(error))
        return 1
    except Exception as error:
        _report(run_dir, "internal", f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return 1
    return 0


def _report(run_dir: Path, kind: str, message: str) -> None:
    path = run_dir / "error.json"
    draft = run_dir / f".error-{os.getpid()}"
    draft.write_text(json.dumps({"kind": kind, "message": message, "rank": int(os.environ.get("RANK", "0"))}))
    try:
        os.link(draft, path)  # the first rank that failed is the one to hear
    except FileExistsError:
        pass
    finally:
        draft.unlink()


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
