"""The whole exception tree.

BatonError(http_status, retryable)
├ ConfigError                 start-up; the process exits with status 2
│ └ CheckpointError           a model directory that cannot be served
├ RequestError                400; `param` names the offending field
│ ├ RequestTooLong            400 context_length_exceeded
│ └ RequestCancelled          499
├ CapacityError               503, retryable; `reason` and `retry_after_s` are for the client
│ ├ NoFreePages
│ ├ NoWorkerAvailable
│ └ Overloaded                429
├ DeadlineExceeded            504
├ WorkerDied                  502, retryable: the router moves the request
│ ├ WorkerSilent              no sign of life for too long
│ └ WorkerLeaving             it drains: its requests go on elsewhere
├ PoisonRequest               500: workers die of it
├ NotFinite                   500, retryable: logits are NaN or infinite
├ ProtocolError               a peer broke the wire contract: its connection is closed
│ ├ WrongSecret
│ └ WrongProtocol             it speaks another version
└ TransferError
  ├ TransferTimeout           retryable
  ├ TicketExpired             retryable
  ├ ChecksumMismatch          retryable
  └ LayoutMismatch            never retried
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of every error Baton raises on purpose.

    Attributes:
        http_status: status that the gateway answers with.
        retryable: whether another attempt, perhaps elsewhere, may succeed.
        code: short machine-readable reason, as in OpenAI's error objects.
    """

    http_status = 500
    retryable = False
    code = "internal_error"


class ConfigError(BatonError):
    """The configuration cannot work; raised at start-up only."""

    code = "config_error"


class CheckpointError(ConfigError):
    """A model directory is truncated, of an unknown architecture, or does not fit."""

    code = "checkpoint_error"


class RequestError(BatonError):
    """The client asked for something that cannot be done.

    Args:
        message: sentence for the client.
        param: name of the offending field in the request body.
        code: machine-readable reason.
    """

    http_status = 400
    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class RequestTooLong(RequestError):
    """The prompt, or prompt plus max_tokens, exceeds the model's context."""

    code = "context_length_exceeded"


class RequestCancelled(RequestError):
    """The client went away."""

    http_status = 499
    code = "request_cancelled"


class CapacityError(BatonError):
    """Nothing can take the request now; another attempt later may succeed.

    Attributes:
        reason: which limit was hit, for a response header.
        retry_after_s: when another attempt makes sense.
    """

    http_status = 503
    retryable = True
    code = "overloaded"
    reason = "unavailable"
    retry_after_s = 1.0


class NoFreePages(CapacityError):
    """The page pool cannot give the pages asked for."""

    code = "no_free_pages"


class NoWorkerAvailable(CapacityError):
    """No worker of the needed role is in the fleet."""

    code = "no_worker_available"
    reason = "no_worker"


class Overloaded(CapacityError):
    """There are workers, and more requests than they can serve in time.

    Args:
        reason, retry_after_s: see CapacityError.
    """

    http_status = 429
    code = "server_overloaded"

    def __init__(self, message: str, reason: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceeded(BatonError):
    """The request took longer than it may."""

    http_status = 504
    code = "deadline_exceeded"


class WorkerDied(BatonError):
    """The connection to a worker that held the request was lost."""

    http_status = 502
    retryable = True
    code = "worker_died"


class WorkerSilent(WorkerDied):
    """A worker gave no sign of life for too long: frozen, or cut off."""

    code = "worker_silent"


class WorkerLeaving(WorkerDied):
    """A worker drains: what it runs goes on elsewhere."""

    code = "worker_leaving"


class PoisonRequest(BatonError):
    """Two workers died at the same token of this request: it is not tried a third time."""

    code = "poison_request"


class NotFinite(BatonError):
    """The model's logits are NaN or infinite: its weights, its cache or the device is damaged, here at least."""

    retryable = True
    code = "logits_not_finite"


class ProtocolError(BatonError):
    """A peer broke the wire contract; its connection is closed."""

    http_status = 502
    code = "protocol_error"


class WrongSecret(ProtocolError):
    """A peer does not know the cluster's secret."""

    code = "wrong_secret"


class WrongProtocol(ProtocolError):
    """A peer speaks another version of the protocol."""

    code = "wrong_protocol"


class TransferError(BatonError):
    """A KV hand-off failed."""

    http_status = 502
    retryable = True
    code = "transfer_error"


class TransferTimeout(TransferError):
    """A peer made no progress within the deadline."""

    code = "transfer_timeout"


class TicketExpired(TransferError):
    """The landing reservation is gone."""

    code = "ticket_expired"


class ChecksumMismatch(TransferError):
    """Bytes of a block differ from those that were sent."""

    code = "checksum_mismatch"


class LayoutMismatch(TransferError):
    """Fingerprints differ: these two workers must never exchange KV."""

    retryable = False
    code = "layout_mismatch"
