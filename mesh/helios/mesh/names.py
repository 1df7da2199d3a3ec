"""Names of metrics, spans and log fields: each is written once.

OpenTelemetry's GenAI names where one exists, in Prometheus form (dots become underscores, the unit is appended).
Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
Own names begin with ``helios``. Ids of requests and replicas go into spans and logs, never into labels.
"""

from typing import Final

# OpenTelemetry GenAI, server side.
REQUEST_DURATION_SECONDS: Final = "gen_ai_server_request_duration_seconds"
TIME_TO_FIRST_TOKEN_SECONDS: Final = "gen_ai_server_time_to_first_token_seconds"  # noqa: S105
TIME_PER_OUTPUT_TOKEN_SECONDS: Final = "gen_ai_server_time_per_output_token_seconds"  # noqa: S105
TOKEN_USAGE: Final = "gen_ai_client_token_usage"  # noqa: S105

# Proxy.
ACTIVATIONS_TOTAL: Final = "helios_activations_total"
ROLLOUT_REQUESTS_TOTAL: Final = "helios_rollout_requests_total"
ROLLOUT_FINISHED_TOTAL: Final = "helios_rollout_finished_total"
ROLLOUT_TIME_TO_FIRST_TOKEN_SECONDS: Final = "helios_rollout_time_to_first_token_seconds"  # noqa: S105
LOAD_REPLICAS: Final = "helios_load_replicas"
SWAPS_TOTAL: Final = "helios_swaps_total"
ACTIVATION_SECONDS: Final = "helios_activation_seconds"
START_PROMISED_RATIO: Final = "helios_start_promised_ratio"
# helios.cold_start.phase.duration in OpenTelemetry's form; attributes phase and model.
COLD_START_PHASE_DURATION_SECONDS: Final = "helios_cold_start_phase_duration_seconds"
ENDPOINTS: Final = "helios_endpoints"
HOLD_BYTES: Final = "helios_hold_bytes"
USAGE_LOST_TOTAL: Final = "helios_usage_lost_total"
HOLDS: Final = "helios_holds"
HOLD_SECONDS: Final = "helios_hold_seconds"
PICKS_TOTAL: Final = "helios_picks_total"
PICK_SECONDS: Final = "helios_pick_seconds"
LANE_UNTOLD_TOTAL: Final = "helios_lane_untold_total"
PREFIX_EMPTIED_TOTAL: Final = "helios_prefix_emptied_total"
PREFIX_LOSSES_TOTAL: Final = "helios_prefix_losses_total"
PREFIX_LOST_BLOCKS_TOTAL: Final = "helios_prefix_lost_blocks_total"
RELAY_MOVES_TOTAL: Final = "helios_relay_moves_total"
RELAY_REQUESTS_TOTAL: Final = "helios_relay_requests_total"
RELAY_STREAMS: Final = "helios_relay_streams"
REPLICAS: Final = "helios_replicas"
RESERVATIONS: Final = "helios_reservations"
WORKERS: Final = "helios_workers"
XDS_ACKS_TOTAL: Final = "helios_xds_acks_total"

# Worker.
COLD_START_PHASE_SECONDS: Final = "helios_cold_start_phase_seconds"
COMMANDS_TOTAL: Final = "helios_worker_commands_total"
DEVICE_BOOKED_BYTES: Final = "helios_device_booked_bytes"
DEVICE_MEMORY_BYTES: Final = "helios_device_memory_bytes"
WORKER_REPLICAS: Final = "helios_worker_replicas"
FLEET_SESSIONS: Final = "helios_worker_fleet_sessions"
OUTBOX_OVERFLOWS_TOTAL: Final = "helios_worker_outbox_overflows_total"
REPLICA_EXITS_TOTAL: Final = "helios_replica_exits_total"

# Storage.
FETCHED_BYTES_TOTAL: Final = "helios_storage_fetched_bytes_total"
LEASES: Final = "helios_storage_leases"
TIER_CAPACITY_BYTES: Final = "helios_storage_tier_capacity_bytes"
TIER_CORRUPT_BLOBS_TOTAL: Final = "helios_storage_tier_corrupt_blobs_total"
TIER_DEMOTIONS_TOTAL: Final = "helios_storage_tier_demotions_total"
TIER_EVICTIONS_TOTAL: Final = "helios_storage_tier_evictions_total"
TIER_HIT_BYTES_TOTAL: Final = "helios_storage_tier_hit_bytes_total"
TIER_HITS_TOTAL: Final = "helios_storage_tier_hits_total"
TIER_MISSES_TOTAL: Final = "helios_storage_tier_misses_total"
TIER_PROMOTIONS_TOTAL: Final = "helios_storage_tier_promotions_total"
TIER_QUEUE_SECONDS_TOTAL: Final = "helios_storage_tier_queue_seconds_total"
TIER_READ_BYTES_PER_SECOND: Final = "helios_storage_tier_read_bytes_per_second"
TIER_SCRUBBED_BYTES_TOTAL: Final = "helios_storage_tier_scrubbed_bytes_total"
TIER_SHARED_BYTES_TOTAL: Final = "helios_storage_tier_shared_bytes_total"
TIER_USED_BYTES: Final = "helios_storage_tier_used_bytes"
TIER_WRITE_BYTES_PER_SECOND: Final = "helios_storage_tier_write_bytes_per_second"
TIER_WRITTEN_BYTES_TOTAL: Final = "helios_storage_tier_written_bytes_total"

# Registry.
INGESTS_TOTAL: Final = "helios_registry_ingests_total"
MODELS: Final = "helios_registry_models"

# Every process.
RPC_ERRORS_TOTAL: Final = "helios_rpc_errors_total"

# Request metadata. Clients may send the first two; Envoy strips every other `x-helios-*` that comes from outside.
MODEL_HEADER: Final = "x-helios-model"
# "true" has a streamed answer go on on another replica where its own dies, and is refused where that can't be; "auto"
# is "true" where it can be; "false": not, whatever the model's policy says.
DURABLE_HEADER: Final = "x-helios-durable"
DURABLE_AUTO: Final = "auto"
# What the client said of its body's length: Envoy's transcoder takes content-length off before the picker sees it.
BODY_BYTES_HEADER: Final = "x-helios-body-bytes"
# A client's own name for a conversation, whose requests meet the same revision of a model that is rolled out.
SESSION_HEADER: Final = "x-session-id"
ENDPOINT_HEADER: Final = "x-helios-endpoint"
ROUTE_MODEL_HEADER: Final = "x-helios-route-model"
CLUSTER_HEADER: Final = "x-helios-cluster"
"""Which of Envoy's clusters the endpoint is in, where there are several proxies: the one that the picking one fills."""
ROUTE_REVISION_HEADER: Final = "x-helios-route-revision"
# Set where the requested name is a LoRA adapter's: a replica that has no such adapter must not answer without it.
ROUTE_ADAPTER_HEADER: Final = "x-helios-route-adapter"
# Address (`host:port`) of the replica that computes the request's prompt for the one that answers.
PREFILL_ENDPOINT_HEADER: Final = "x-helios-prefill-endpoint"
PRIORITY_HEADER: Final = "x-helios-priority"
"""The band of priority of a request's caller, for the engine's queue: 1 is low, 2 normal, 3 high."""
EXPECTED_TOKENS_HEADER: Final = "x-helios-expected-tokens"
"""Tokens that its answer is likely to have, by what its caller's answers had."""
COHORT_HEADER: Final = "x-helios-cohort"
"""A value that requests have in common whose prompts begin alike."""
# Fields of OpenAI's bodies that Envoy lifts for the picker. What bounds an answer: the largest, the same by its newer
# name, and how many.
ANSWER_FIELDS: Final = ("max_tokens", "max_completion_tokens", "n")
# Whose request it is, of which conversation, the narrowest first: such requests go to one revision of a rollout.
SESSION_FIELDS: Final = ("prompt_cache_key", "safety_identifier", "user")
# How urgent a request is: "auto", "default", "flex" (waits for others), "priority" or "scale" (goes first).
TIER_FIELD: Final = "service_tier"
# The same from clients that have no such field (native gRPC). The field goes before; answers say what was given.
TIER_HEADER: Final = "x-service-tier"
# Answers carry these, as OpenAI's do. The picker, which is gone by then, leaves them with the request (`kept_header`).
RATE_LIMIT_HEADERS: Final = tuple(
    f"x-ratelimit-{part}-{what}" for what in ("requests", "tokens") for part in ("limit", "remaining", "reset")
)
# Why a request was refused before it reached a replica: the error's reason, in lower case.
REFUSAL_REASON_HEADER: Final = "x-helios-reason"
REQUEST_ID_HEADER: Final = "x-request-id"
# How many other candidates Envoy may try before the first byte.
MAX_RETRIES_HEADER: Final = "x-envoy-max-retries"
# All of a request's headers that the picker reads: Envoy sends it no others.
PICKER_HEADERS: Final = (
    ":path",
    REQUEST_ID_HEADER,
    MODEL_HEADER,
    BODY_BYTES_HEADER,
    "content-length",
    "grpc-timeout",
    "traceparent",
    SESSION_HEADER,
    DURABLE_HEADER,
    TIER_HEADER,
    "authorization",
)
# Where Envoy puts what it lifts from a JSON body, and the model's key there.
METADATA_NAMESPACE: Final = "helios"
MODEL_KEY: Final = "model"
# The filter of Envoy that is the express lane, and the resource of xDS that says what it does.
EXPRESS_FILTER: Final = "helios.express"
# A model with several replicas among which Envoy picks by itself, its own name (`helios/mesh/envoy/lane.lua`).
LANE_HEADER: Final = "x-helios-lane"
# What our own API keys begin with; other secrets in Authorization are whatever a client library insists on.
KEY_PREFIX: Final = "sk-helios-"
# The lease that the leader of several proxies holds; there is none where one proxy runs.
PROXY_LEASE: Final = "proxy-leader"


def kept_header(name: str) -> str:
    """The request header in which the picker leaves a header (`x-…`) for the answer."""
    return f"x-helios-{name.removeprefix('x-')}"
