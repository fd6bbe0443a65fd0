"""The table of methods. To add a method, write one file here and add one line to the table below."""

from collections.abc import Mapping
from dataclasses import replace

from steerlab.job import Entries, MethodConfig, Table
from steerlab.methods.contract import Fitted, Method, Trained
from steerlab.methods.edited import Edited

# Name of the method -> its file, whose METHOD it is. The table is a literal dict instead of a registry that decorators fill, so
# that it can be read here. It holds the names of files instead of imports, because a job needs one method only.
_OWN = {
    "none": "none",
    "vanilla": "vanilla",
    "aside": "aside",
    "ise": "ise",
    "warp": "warp",
    "resta": "resta",
    "safe_lora": "safe_lora",
    "sn_tune": "sn_tune",
    "safe_delta": "safe_delta",
    "lineas": "lineas",
    "linear_act": "transport:LINEAR",
    "mean_act": "transport:MEAN",
    "gaussian_act": "transport:GAUSSIAN",
    "aura": "aura",
    "caa": "caa",
    "iti": "iti",
    "iti_heads": "iti_heads",
    "ablation": "ablation",
    "repe": "repe",
    "reft": "reft",
    "iav": "iav",
    "dpo": "dpo",
    "simpo": "simpo",
    "genarm": "genarm",
    "args": "args",
    "denoise": "denoise",
    "prompt": "prompt",
    "imported": "imported",
}


# A method from a file gets its config class made anew, with the field `file` in it; the table keeps the rest.
TABLE: Table[Method] = Table(
    Method, "name", Entries(Method, __name__, _OWN), lambda method, config: replace(method, Config=config)
)
"""The methods above, those of installed packages, and those of files that jobs name."""
# The entries are imported at their first use, so that the table itself loads neither a method nor torch.
METHODS = TABLE.entries
"""Methods by name."""


def trained(config: MethodConfig | Mapping[str, object]) -> Trained:
    """Return the trained method of a config, which may be the JSON in a stage's parameters."""
    method = TABLE.of(config)
    # Stages that call this function are planned for trained methods only, so any other kind here is a bug of this package.
    assert isinstance(method, Trained), f"{config} trains nothing"
    return method


def fitted(config: MethodConfig | Mapping[str, object]) -> Fitted:
    """Return the closed-form method of a config, which may be the JSON in a stage's parameters."""
    method = TABLE.of(config)
    assert isinstance(method, Fitted), f"{config} is not a closed-form method"
    return method


def edited(config: MethodConfig | Mapping[str, object]) -> Edited:
    """Return the method of a config that changes trained weights; the config may be the JSON in a stage's parameters."""
    method = TABLE.of(config)
    assert isinstance(method, Edited), f"{config} changes no trained weights"
    return method
