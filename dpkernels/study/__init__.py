"""Privacy, utility and risk on one's own data: train at several budgets, attack, put side by side.

`runner.Study` works on any `dpkernels.training.trainer.Trainer`; `campaign.attack_run` attacks one
run. The commands and the Python interface of a task live in its own room.
"""
