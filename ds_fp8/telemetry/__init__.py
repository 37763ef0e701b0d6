"""What a job in FP8 reports about itself: ranges used, overflow, flush to zero, bytes on the wire.

A `TensorStatistics` describes one operand of one layer at one step. Aggregates of all of them (about twenty numbers) go
to DeepSpeed's own monitor, so TensorBoard, W&B, CSV and Comet show them; each one goes to a JSONL log; and alarms name
the layer and the key of the JSON to change. Nothing here needs torch: `engine.watch` brings the numbers.
"""

from __future__ import annotations

from .aggregate import aggregate
from .alarms import Alarm, find_alarms
from .jsonl_log import JsonlLog, read_jsonl_log
from .tensor_statistics import TensorStatistics

__all__ = ["Alarm", "JsonlLog", "TensorStatistics", "aggregate", "find_alarms", "read_jsonl_log"]
