"""The simulation: the real gateway with a model of the engine, on a virtual clock, driven by one seed.

make simulate ARGS="--seeds 1000" or make simulate ARGS="--seed 17"

A failing seed is printed, and replays exactly. `docs/simulation.md` says what is simulated and what is not.
"""
