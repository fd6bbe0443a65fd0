"""Sweeps: run one job at many points of a search space with Ray Tune, and compare the trials.

A *trial* is one point of the space. Trials that differ only in the strength of the patch form a *unit*, which is one job
and one Ray Tune trial. The files, in the order in which a sweep uses them:

    space.py, space_entries.py   read and check a search space file, and each of its entries
    space_keys.py                refuse unknown keys of a space
    trials.py, units.py          turn points of the space into jobs, and group them into units
    sweep_request.py             check a sweep before anything starts
    estimate.py                  estimate what a sweep would cost (`--dry-run`)
    driver.py                    start or resume a sweep
    tuner.py, search.py          configure Ray Tune; feed it units from grid, random or Optuna search
    agent.py, page.py            let Weights & Biases choose the points; keep the sweep's page there
    trial.py, processes.py       run a unit in a process of Ray Tune, and reuse these processes
    stops.py                     ask a process to stop its unit early
    history.py, clerk.py         the event log from which a sweep resumes, and the Ray Tune callback that writes it
    results.py                   the table of trials, the best trial, and the trials that cannot be distinguished from it
    conclusion.py                write the table and the summary, and run the best trial on the test rows
"""
