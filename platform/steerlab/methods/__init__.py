"""The table of methods. A further method is one new file here and one line below."""

from steerlab.methods import aside, ise, vanilla
from steerlab.methods.contract import Method

METHODS: dict[str, Method] = {
    "vanilla": vanilla.METHOD,
    "aside": aside.METHOD,
    "ise": ise.METHOD,
}
