"""Runs of a store → runs that a sync can bring. Each importer reads one kind of store, and writes
nothing there.

recognise   which kind of store an argument of `mlflow-relay sync` is
spool       folders of this project's daemons
segments    what stands in their segments
mlruns      MLflow's file store
sqlite      MLflow's database in a file
server      an MLflow server
foreign     what the last three have in common: names, ids, tags
"""
