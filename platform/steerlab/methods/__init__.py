"""The table of methods. A further method is one new file here and one line below."""

from steerlab.methods import aside, aura, caa, denoise, dpo, genarm, iav, ise, iti, lineas, none, transport, vanilla, warp
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
