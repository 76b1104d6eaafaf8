"""The application for Ray Serve: ``serve run`` and ``serve deploy`` call ``build`` with the ``args`` of their file."""

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Application

from melt_ray.arguments import ServeArgs
from melt_ray.bundles import BundleIdentity, fingerprint_of
from melt_ray.engine import Engine
from melt_ray.ingress import Ingress
from melt_ray.router import ConversationRouter
from melt_runtime.errors import BundleError

__all__ = ["ServeArgs", "build"]

_LAST_SECONDS = 5.0
"""For an ingress to pass on what replicas said at their end."""


def build(args: ServeArgs) -> Application:
    """The application: an ingress before replicas of one model.

    Raises:
        BundleError: there is no bundle on this node, and nobody says which one it is.
    """
    engine = serve.deployment(Engine).options(
        name="engine",
        max_ongoing_requests=args.requests_of_replica,
        max_queued_requests=args.most_waiting,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus, "resources": args.resources},
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.target_requests or args.slots,
            upscale_delay_s=args.upscale_seconds,
            downscale_delay_s=args.downscale_seconds,
        ),
        health_check_period_s=args.health_seconds,
        graceful_shutdown_timeout_s=args.drain_seconds,
        request_router_config=RequestRouterConfig(
            request_router_class=ConversationRouter, request_router_kwargs={"most_ahead": args.slots}
        ),
    )
    ingress = serve.deployment(Ingress).options(
        name="ingress",
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=args.most_waiting + args.max_replicas * args.requests_of_replica,
        ray_actor_options={"num_cpus": args.ingress_cpus, "resources": args.ingress_resources},
        graceful_shutdown_timeout_s=args.drain_seconds + _LAST_SECONDS,
    )
    expected = BundleIdentity(str(args.bundle), args.fingerprint or _fingerprint_here(args))
    return ingress.bind(
        engine.bind(args, expected), args.most_bytes, args.answer_seconds, args.router == "conversation"
    )


def _fingerprint_here(args: ServeArgs) -> str:
    try:
        return fingerprint_of(args.bundle)
    except BundleError as error:
        raise BundleError(
            f"bundle {args.bundle} must be on the node that builds the application, or fingerprint must say which one "
            f"it is, as melt-ray fingerprint prints it where the bundle lies: {error}"
        ) from error
