"""The table of methods. To add a method, write one file here and add one line to the table below."""

from collections.abc import Mapping
from dataclasses import replace

from steerlab.job import MethodConfig, Table
from steerlab.methods import (
    ablation,
    args,
    aside,
    aura,
    caa,
    denoise,
    dpo,
    genarm,
    iav,
    imported,
    ise,
    iti,
    iti_heads,
    lineas,
    none,
    reft,
    repe,
    resta,
    safe_delta,
    safe_lora,
    simpo,
    sn_tune,
    transport,
    vanilla,
    warp,
)
from steerlab.methods.contract import Fitted, Method, Trained
from steerlab.methods.edited import Edited

# A literal and no decorator: the table can be read here, and a method that nobody imports cannot exist.
_OWN: dict[str, Method] = {
    "none": none.METHOD,
    "vanilla": vanilla.METHOD,
    "aside": aside.METHOD,
    "ise": ise.METHOD,
    "warp": warp.METHOD,
    "resta": resta.METHOD,
    "safe_lora": safe_lora.METHOD,
    "sn_tune": sn_tune.METHOD,
    "safe_delta": safe_delta.METHOD,
    "lineas": lineas.METHOD,
    "linear_act": transport.LINEAR,
    "mean_act": transport.MEAN,
    "gaussian_act": transport.GAUSSIAN,
    "aura": aura.METHOD,
    "caa": caa.METHOD,
    "iti": iti.METHOD,
    "iti_heads": iti_heads.METHOD,
    "ablation": ablation.METHOD,
    "repe": repe.METHOD,
    "reft": reft.METHOD,
    "iav": iav.METHOD,
    "dpo": dpo.METHOD,
    "simpo": simpo.METHOD,
    "genarm": genarm.METHOD,
    "args": args.METHOD,
    "denoise": denoise.METHOD,
    "imported": imported.METHOD,
}


# A method from a file gets its config class made anew, with the field `file` in it; the table keeps the rest.
TABLE: Table[Method] = Table(Method, "name", _OWN, lambda method, config: replace(method, Config=config))
"""The methods above, those of installed packages, and those of files that jobs name."""
METHODS = TABLE.entries
"""Methods by name."""


def trained(config: MethodConfig | Mapping[str, object]) -> Trained:
    """Return the trained method of a config, which may be the JSON in a stage's parameters."""
    method = TABLE.of(config)
    assert isinstance(method, Trained), f"{config} trains nothing"
    return method


def fitted(config: MethodConfig | Mapping[str, object]) -> Fitted:
    """Return the closed-form method of a config, which may be the JSON in a stage's parameters."""
    method = TABLE.of(config)
    assert isinstance(method, Fitted), f"{config} is no closed form"
    return method


def edited(config: MethodConfig | Mapping[str, object]) -> Edited:
    """Return the method of a config that changes trained weights; the config may be the JSON in a stage's parameters."""
    method = TABLE.of(config)
    assert isinstance(method, Edited), f"{config} changes no trained weights"
    return method
