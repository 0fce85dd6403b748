"""Trains on the tiny data of the unit tests: python -m tests.train_tiny EDGE_FOLDER RUN_FOLDER EPISODES_A_STEP."""

import sys
from pathlib import Path

from loragen_agents.training.trainer import train
from tests.unit.test_trainer import data, recipe

if __name__ == "__main__":
    edge, folder, episodes = sys.argv[1:]
    # No evaluation between: both runs end with the weights of the last step.
    settings = {"every": 100, "episodes": 1, "tools": 2}
    short = recipe(edge, steps=4, log_every=1, save_every=4, episodes=int(episodes), evaluation=settings)
    train(short, Path(folder), data=data())
