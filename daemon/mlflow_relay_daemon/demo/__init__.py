"""The demo: a real training, whose MLflow server and daemon are killed, and the count."""
