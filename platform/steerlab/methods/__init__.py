"""The table of methods. A further method is one new file here and one line below."""

from collections.abc import Mapping
from dataclasses import replace

from steerlab.job import MethodConfig, Table
from steerlab.methods import (
    ablation,
    aside,
    aura,
    caa,
    denoise,
    dpo,
    genarm,
    iav,
    ise,
    iti,
    iti_heads,
    lineas,
    none,
    reft,
    repe,
    transport,
    vanilla,
    warp,
)
from steerlab.methods.contract import Fitted, Method, Trained

_OWN: dict[str, Method] = {
    "none": none.METHOD,
    "vanilla": vanilla.METHOD,
    "aside": aside.METHOD,
    "ise": ise.METHOD,
    "warp": warp.METHOD,
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
    "genarm": genarm.METHOD,
    "denoise": denoise.METHOD,
}


TABLE: Table[Method] = Table(Method, "name", _OWN, lambda method, config: replace(method, Config=config))
"""With the methods of installed packages, and of the files that jobs name."""
METHODS = TABLE.entries


def trained(config: MethodConfig | Mapping[str, object]) -> Trained:
    """Return the method of a config, or of one in a stage's parameters, which is one that trains."""
    method = TABLE.of(config)
    assert isinstance(method, Trained), f"{config} trains nothing"
    return method


def fitted(config: MethodConfig | Mapping[str, object]) -> Fitted:
    """Return the method of a config, or of one in a stage's parameters, which is a closed form."""
    method = TABLE.of(config)
    assert isinstance(method, Fitted), f"{config} is no closed form"
    return method
