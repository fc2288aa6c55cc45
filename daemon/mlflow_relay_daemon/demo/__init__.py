"""The demo: a real training, an MLflow server and a daemon that fail in its middle, and the count."""
