"""One run's way to MLflow.

creation    have an MLflow run, one for all nodes
links       its parent and its fork, as soon as they are known
by_hand     what an operator says of links that wait
relatives   the runs around a run, as the server knows them
batches     records → requests, what is refused → dead letters
ending      how and when it ended, told once by all nodes
lane        one step after the other
"""

from mlflow_relay_daemon.lane.lane import Lane

__all__ = ["Lane"]
