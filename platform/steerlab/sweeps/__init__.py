"""A job, a search space, and the trials that Ray Tune makes of them.

`space.py` reads and checks a search space whose entries `entries.py` knows, `trials.py` turns its points into jobs and
`units.py` groups them; `sweep_request.py` checks a sweep before it starts, `estimate.py` says what it would cost.
`driver.py` begins it or goes on with it, `tuner.py` gives it to Ray Tune, whose searcher is in `search.py`, and
`conclusion.py` ends it. `trial.py` runs a unit in one of Tune's processes (`processes.py`), which `stops.py` asks to
end; with `agent.py`, Weights & Biases chooses the points, and `page.py` keeps the sweep's page there. `history.py` is
what a sweep remembers, `clerk.py` writes it down, and `results.py` compares trials.
"""
