"""Requests of MLflow's REST API → calls of a store of the mlflow package."""

from __future__ import annotations

from typing import Any

from mlflow_relay_daemon.sinks import Refused


def carry_out(store: Any, name: str, body: dict[str, Any]) -> None:
    """Do what a request asks.

    Args: name: its path; body: its JSON object.
    Raises: Refused: not a request that changes a run; whatever the store raises.
    """
    from mlflow import entities
    from mlflow.protos import service_pb2 as protos
    from mlflow.utils import proto_json_utils

    parse_dict: Any = proto_json_utils.parse_dict
    run_id = body["run_id"]
    match name:
        case "runs/update":
            status = body.get("status")
            code = None if status is None else entities.RunStatus.from_string(status)
            store.update_run_info(run_id, code, body.get("end_time"), body.get("run_name"))
        case "runs/delete":
            store.delete_run(run_id)
        case "runs/restore":
            store.restore_run(run_id)
        case "runs/delete-tag":
            store.delete_tag(run_id, body["key"])
        case "runs/log-batch":
            batch = protos.LogBatch()
            parse_dict(body, batch)
            store.log_batch(
                run_id,
                [entities.Metric.from_proto(each) for each in batch.metrics],
                [entities.Param.from_proto(each) for each in batch.params],
                [entities.RunTag.from_proto(each) for each in batch.tags],
            )
        case "runs/log-inputs":
            inputs = protos.LogInputs()
            parse_dict(body, inputs)
            datasets = [entities.DatasetInput.from_proto(each) for each in inputs.datasets]
            store.log_inputs(run_id, datasets)
        case "runs/outputs":
            outputs = protos.LogOutputs()
            parse_dict(body, outputs)
            models = [entities.LoggedModelOutput.from_proto(each) for each in outputs.models]
            store.log_outputs(run_id, models)
        case _:
            raise Refused(f"{name} is no request that changes a run")
