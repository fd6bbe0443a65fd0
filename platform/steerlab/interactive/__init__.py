"""The Python interface: the functions and classes of `import steerlab`, for scripts, sessions and notebooks.

These modules compute nothing themselves. A fit makes the plan of a job and runs its stages in this process; a model generates
with the code of the tasks; the code of the report reads a run.
"""

from steerlab.interactive.compared_runs import Comparison, compare
from steerlab.interactive.fitting import fit
from steerlab.interactive.model_loading import load
from steerlab.interactive.opened_model import Model
from steerlab.interactive.opened_run import Run, read_run
from steerlab.interactive.opened_sweep import Sweep, read_sweep
from steerlab.interactive.outputs import Activations, Images, Text, Texts
from steerlab.interactive.patch import Patch, load_patch
from steerlab.interactive.run_job import run
from steerlab.interactive.written_page import report

__all__ = [
    "Activations",
    "Comparison",
    "Images",
    "Model",
    "Patch",
    "Run",
    "Sweep",
    "Text",
    "Texts",
    "compare",
    "fit",
    "load",
    "load_patch",
    "read_run",
    "read_sweep",
    "report",
    "run",
]
