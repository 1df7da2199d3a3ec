"""The proxy's metrics. Names live in `helios.mesh.names`; ids never become labels."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from helios.mesh import names

_PICK_BUCKETS: Final = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3)
_WAIT_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600)
# Phases on one machine take a millisecond, weights from far away minutes.
_PHASE_BUCKETS: Final = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 120, 600)
# Half and double are what a client that comes again notices.
_RATIO_BUCKETS: Final = (0.1, 0.25, 0.5, 0.8, 1.0, 1.25, 2, 4, 10)

PICKS: Final = Counter(names.PICKS_TOTAL, "Requests that the picker answered, by outcome", ["outcome"])
PICK_SECONDS: Final = Histogram(names.PICK_SECONDS, "Time of one routing decision", buckets=_PICK_BUCKETS)
HOLDS: Final = Gauge(names.HOLDS, "Requests that wait for a replica")
HOLD_BYTES: Final = Gauge(names.HOLD_BYTES, "Bytes of bodies of requests that wait")
HOLD_SECONDS: Final = Histogram(names.HOLD_SECONDS, "How long requests waited", ["outcome"], buckets=_WAIT_BUCKETS)
ACTIVATIONS: Final = Counter(names.ACTIVATIONS_TOTAL, "Starts of replicas, by outcome", ["outcome"])
ACTIVATION_SECONDS: Final = Histogram(
    names.ACTIVATION_SECONDS, "From the decision to start a replica until it was ready", buckets=_WAIT_BUCKETS
)
START_ERROR: Final = Histogram(
    names.START_PROMISED_RATIO,
    "What was promised of a start or wake over what it took, by the rung that it came from",
    ["rung"],
    buckets=_RATIO_BUCKETS,
)
ROLLOUT_REQUESTS: Final = Counter(
    names.ROLLOUT_REQUESTS_TOTAL,
    "Requests of models that are rolled out, by the revision that they went to; fallback: the canary's, to the served",
    ["model", "outcome"],
)
ROLLOUT_FINISHED: Final = Counter(
    names.ROLLOUT_FINISHED_TOTAL,
    "Requests of models that are rolled out, as replicas ended them, by revision and gRPC code",
    ["model", "revision", "code"],
)
ROLLOUT_FIRST_TOKEN: Final = Histogram(
    names.ROLLOUT_TIME_TO_FIRST_TOKEN_SECONDS,
    "Time to the first token at the replica, of models that are rolled out, by revision",
    ["model", "revision"],
    buckets=_WAIT_BUCKETS,
)
LOAD_REPLICAS: Final = Gauge(
    names.LOAD_REPLICAS, "Replicas that the loads of models ask for, of those that ask for two or more", ["model"]
)
SWAPS: Final = Counter(names.SWAPS_TOTAL, "Compiled replicas that were to replace eager ones, by outcome", ["outcome"])
COLD_START_PHASE: Final = Histogram(
    names.COLD_START_PHASE_DURATION_SECONDS,
    "How long each phase of a cold start took, by model",
    ["model", "phase"],
    buckets=_PHASE_BUCKETS,
)
PREFIX_LOSSES: Final = Counter(
    names.PREFIX_LOSSES_TOTAL, "Prompts of which a replica told that its KV cache lost them, in part or whole"
)
PREFIX_LOST_BLOCKS: Final = Counter(
    names.PREFIX_LOST_BLOCKS_TOTAL, "Blocks of prompts that are not believed cached any more, because a replica told so"
)
PREFIX_EMPTIED: Final = Counter(
    names.PREFIX_EMPTIED_TOTAL, "Replicas of whose KV cache nothing was believed any more: emptied, or losses missed"
)
LANE_UNTOLD: Final = Counter(
    names.LANE_UNTOLD_TOTAL,
    "Requests that Envoy picked a replica for and could not tell of: a call failed, or too many",
)
WORKERS: Final = Gauge(names.WORKERS, "Workers that can be reached")
REPLICAS: Final = Gauge(names.REPLICAS, "Replicas, by state", ["state"])
RESERVATIONS: Final = Gauge(names.RESERVATIONS, "Picks whose request has not been reported yet")
ENDPOINTS: Final = Gauge(names.ENDPOINTS, "Endpoints that are published to Envoy")

USAGE_LOST: Final = Counter(names.USAGE_LOST_TOTAL, "Hours of models whose usage was lost, the registry being away")

PICKED: Final = PICKS.labels("picked")
RELEASED: Final = PICKS.labels("released")
# Requests that nobody was asked about, as replicas told of them, or Envoy.
EXPRESS: Final = PICKS.labels("express")
