"""DeepSpeed's private attributes that runtime/sharded.py uses: a release that renames one is found here, not in a run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator, stage3, stage_1_and_2

from grpo_safe.runtime import process, sharded

METHODS = {
    stage_1_and_2.DeepSpeedZeroOptimizer: ["_lazy_init_hp_params_optimizer_state", "update_lp_params"],
    stage3.DeepSpeedZeroOptimizer_Stage3: ["_reassign_or_swap_out_partitioned_parameters"],
    parameter_offload.DeepSpeedZeRoOffload: ["_register_deepspeed_module", "get_param_coordinator"],
    partitioned_param_coordinator.PartitionedParameterCoordinator: ["_invalidate_trace", "is_invalid_trace"],
}
ASSIGNED = {
    stage_1_and_2.DeepSpeedZeroOptimizer: ["_hp_optimizer_states_linked", "single_partition_of_fp32_groups", "optimizer"],
    stage3.DeepSpeedZeroOptimizer_Stage3: [
        "fp32_partitioned_groups_flat",
        "parameter_offload",
        "persistent_parameters",
        "optimizer",
    ],
    parameter_offload.DeepSpeedZeRoOffload: ["forward_hooks", "backward_hooks", "module"],
}
OF_PARAMETERS = ["ds_tensor", "ds_shape", "ds_active_sub_modules"]


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in METHODS.items() for name in names])
def test_methods(owner: type, name: str) -> None:
    assert callable(getattr(owner, name, None))


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in ASSIGNED.items() for name in names])
def test_attributes(owner: type, name: str) -> None:
    assert re.search(rf"self\.{name}\b[^=\n]*= ", inspect.getsource(owner))


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_attributes_of_a_partitioned_parameter(name: str) -> None:
    assert re.search(rf"param\.{name} = ", inspect.getsource(partition_parameters))


def test_the_lists_above_are_whole() -> None:
    """Every attribute with an underscore in front, and every one of a parameter, that our code takes from DeepSpeed stands above."""
    source = inspect.getsource(sharded) + inspect.getsource(process)
    named = {name for table in (METHODS, ASSIGNED) for names in table.values() for name in names} | set(OF_PARAMETERS)
    own = {"_whole", "_remove_hooks", "_restore_hooks", "_refresh_model_weights"}
    used = set(re.findall(r"\.(_[a-z]\w+)", source)) - own | set(re.findall(r"\b(ds_[a-z_]+)\b", source))
    assert used and used <= named


def test_the_release_is_bounded() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'"deepspeed>=0\.\d+,<0\.\d+"', project)
