"""The files that a cluster is told: what they say is what ``build`` takes."""

from pathlib import Path

import pytest
import yaml

from melt_ray.arguments import ServeArgs

HERE = Path(__file__).parent.parent


def serve_configs() -> dict[str, dict]:
    service = yaml.safe_load((HERE / "rayservice.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((HERE / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", serve_configs())
def test_what_a_file_says_is_taken(name):
    from ray.serve.schema import ServeDeploySchema

    config = serve_configs()[name]
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "melt_ray.serve:build"
    ServeArgs(**application["args"])


def test_the_cluster_has_room_for_what_it_shall_run():
    service = yaml.safe_load((HERE / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    (application,) = serve_configs()["rayservice.yaml"]["applications"]
    args, scaling = ServeArgs(**application["args"]), application["deployments"][0]["autoscaling_config"]
    (group,) = service["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert float(pod["containers"][0]["resources"]["limits"]["cpu"]) >= args.cpus
    assert group["maxReplicas"] >= scaling["max_replicas"]
    assert scaling["target_ongoing_requests"] == args.slots
    assert pod["terminationGracePeriodSeconds"] > args.drain_seconds
    head = service["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert float(head["resources"]["limits"]["cpu"]) >= args.ingress_replicas * args.ingress_cpus
