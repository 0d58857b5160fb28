"""All boards."""

from __future__ import annotations

from deploy.monitoring.boards_fleet import DEVICES, FLEET
from deploy.monitoring.boards_pools import DECODE_POOL, PREFILL_POOL, TRANSFER
from deploy.monitoring.boards_service import GATEWAY, OVERVIEW, ROUTER
from deploy.monitoring.panels import Board

BOARDS: tuple[Board, ...] = (OVERVIEW, GATEWAY, ROUTER, PREFILL_POOL, DECODE_POOL, TRANSFER, DEVICES, FLEET)
