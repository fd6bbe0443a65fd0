"""The table of methods. A further method is one new file here and one line below."""

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

METHODS: dict[str, Method] = {
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


def trained(name: str) -> Trained:
    """Return a method that trains, where nothing else can be asked for."""
    method = METHODS[name]
    assert isinstance(method, Trained), f"{name} trains nothing"
    return method


def fitted(name: str) -> Fitted:
    """Return a closed form, where nothing else can be asked for."""
    method = METHODS[name]
    assert isinstance(method, Fitted), f"{name} is no closed form"
    return method
