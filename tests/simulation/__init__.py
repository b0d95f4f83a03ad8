"""The simulation: the real gateway against a small model of the engine, on a virtual clock, from one seed.

    make simulate ARGS="--seeds 1000"
    make simulate ARGS="--seed 17"

A failing seed is printed, and replays exactly. `docs/simulation.md` says what is simulated and what is not.
"""
