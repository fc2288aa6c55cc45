"""The daemon of one node: takes what ranks log, keeps it on disk, brings it to MLflow."""
