"""What the service measures, for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.responses import Response

from snaporch.service.service import Service


def exposition(service: Service) -> Response:
    """Return all figures as they are now, as Prometheus reads them."""
    registry = CollectorRegistry()
    active = list(service.jobs.active())
    queued = sum(job.state == "queued" for job in active)
    Gauge("snaporch_operations_queued", "Operations that wait.", registry=registry).set(queued)
    Gauge("snaporch_operations_running", "Operations that run.", registry=registry).set(len(active) - queued)
    Gauge("snaporch_followers", "Clients that follow events.", registry=registry).set(service.streams)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
