"""A job, a search space, and the trials that Ray Tune makes of them.

`space.py` reads and checks a search space whose entries `entries.py` knows, `trials.py` turns its points into jobs,
`search.py` hands them to Ray Tune, `trial.py` runs them in Tune's processes (`processes.py`), which `stops.py` asks
to end; with `agent.py`, Weights & Biases chooses the points, and `page.py` keeps the sweep's page there. `history.py`
is what a sweep remembers and `clerk.py` who writes it down, `results.py` what it found, `driver.py` the whole,
`estimate.py` what it would cost.
"""
